"""The names of `lightning_mgpu.ray`, which need no Ray."""

import subprocess
import sys

import pytest

import lightning_mgpu.ray


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RayPlugin", "it is called `RayStrategy` now"),
        ("HorovodRayPlugin", "Horovod has left Lightning. `RayStrategy` takes the same arguments"),
        ("HorovodRayStrategy", "Horovod has left Lightning"),
        ("RayShardedPlugin", "it is called `RayShardedStrategy` now"),
    ],
)
def test_old_names_say_what_to_use(name: str, words: str) -> None:
    with pytest.raises(ImportError, match=words):
        getattr(lightning_mgpu.ray, name)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'RayTactics'"):
        _ = lightning_mgpu.ray.RayTactics


def test_ray_is_imported_on_first_use() -> None:
    code = (
        "import sys, lightning_mgpu.ray as r; before = 'ray' in sys.modules; r.RayStrategy;"
        " print(before, 'ray' in sys.modules, dir(r))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    strategies = [f"Ray{kind}Strategy" for kind in ("Pipeline", "Sharded", "")]
    names = [*strategies, "close", "fit", "keep_warm", "prepare_trainer"]
    assert done.stdout.strip() == f"False True {names}"
