"""Draw all pictures of a sweep, one per file."""

from pathlib import Path

from matplotlib.figure import Figure

from lightning_mgpu.sweep.report.importance import Importance
from lightning_mgpu.sweep.report.model import SweepHistory
from lightning_mgpu.sweep.report.png.curves import learning_curves
from lightning_mgpu.sweep.report.png.epochs import epochs
from lightning_mgpu.sweep.report.png.parallel import parallel
from lightning_mgpu.sweep.report.png.parameters import importances, scatter
from lightning_mgpu.sweep.report.png.worker_lanes import workers

_DPI = 110


def draw(sweep: SweepHistory, importance: Importance | None, directory: Path) -> list[Path]:
    """Draw all pictures with content; remove those of an earlier report."""
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
