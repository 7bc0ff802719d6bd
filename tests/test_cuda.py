"""On a GPU: the same numbers as on the CPU, and no step that waits for the device."""

from pathlib import Path

import pytest
import torch
from cases import BY_NAME, Case, joint_step
from run_helpers import start, write_shards

from ghostEngines.strategies import STRATEGIES
from training_loop import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

N, M = 5, 3
CASES = [
    BY_NAME[name]
    for name in ("gpt2-tied-padded", "fused-gpt2-tied-padded", "fused-gpt2-untied", "tied-linear")
]


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_on_the_gpu(case: Case, strategy: str | None) -> None:
    truth = case.truth(N, M)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = case.model().to("cuda", dtype)
        x, y = (part.cuda() for part in case.data(N + M))
        dots, _ = joint_step(model, x, y, M, case.losses, strategy=strategy)
        assert truth.dot_error(dots.cpu()) < bound
        assert truth.gradient_error(model.cpu()) < bound


@pytest.mark.parametrize("method", ["GradDotProd", "Regular"])
@pytest.mark.parametrize("train_dtype", ["bfloat16", "float32"])
def test_a_step_does_not_wait_for_the_device(
    train_dtype: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the first, which sets up, and those that are logged."""
    step = Trainer._step

    def strict(self: Trainer, number: int) -> None:
        mode = "error" if number > 0 and not self._waits(number) else "default"
        torch.cuda.set_sync_debug_mode(mode)
        try:
            step(self, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_step", strict)
    data = write_shards(tmp_path / "shards")
    flags = {"method": method, "train_dtype": train_dtype, "log_interval": 6, "dot_prod_save_interval": 12}
    run = start(data, tmp_path, run_name="a", device="cuda", max_steps=12, **flags)
    assert run.status == 0 and len(run.metrics()) == 2
