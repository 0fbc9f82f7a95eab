"""All pictures of a sweep, each into a file of its own."""

from pathlib import Path

from matplotlib.figure import Figure

from lightning_mgpu.report.sweep.importance import Importance
from lightning_mgpu.report.sweep.model import Sweep
from lightning_mgpu.report.sweep.png.curves import learning_curves
from lightning_mgpu.report.sweep.png.epochs import epochs
from lightning_mgpu.report.sweep.png.parallel import parallel
from lightning_mgpu.report.sweep.png.parameters import importances, scatter
from lightning_mgpu.report.sweep.png.workers import workers

__all__: list[str] = []

_DPI = 110


def draw(sweep: Sweep, importance: Importance | None, directory: Path) -> list[Path]:
    """Draw what there is to see; pictures of an earlier report are taken away."""
    figures: dict[str, Figure | None] = {
        "learning_curves": learning_curves(sweep),
        "parallel_coordinates": parallel(sweep),
        "importance": importances(sweep, importance),
        "parameters": scatter(sweep),
        "timeline": workers(sweep),
        "epochs": epochs(sweep),
    }
    drawn = []
    for name, figure in figures.items():
        path = directory / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            figure.savefig(path, dpi=_DPI)
            drawn.append(path)
    return drawn
