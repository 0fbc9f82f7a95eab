"""All pictures of a sweep, each into a file of its own."""

from pathlib import Path

from matplotlib.figure import Figure

from lightning_mgpu.sweep.report.importance import Importance
from lightning_mgpu.sweep.report.model import Sweep
from lightning_mgpu.sweep.report.png.curves import learning_curves
from lightning_mgpu.sweep.report.png.epochs import epochs
from lightning_mgpu.sweep.report.png.parallel import parallel
from lightning_mgpu.sweep.report.png.parameters import importances, scatter
from lightning_mgpu.sweep.report.png.worker_lanes import workers

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
