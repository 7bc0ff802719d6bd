"""Between logging steps, training reads no tensor's values, for which a GPU would have to be waited for."""

from pathlib import Path

import pytest
import torch
from run_helpers import start
from torch.utils._python_dispatch import TorchDispatchMode

from run.state import TrainingState
from training_loop import Trainer

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Reads(TorchDispatchMode):
    """Counts the operations whose result depends on waiting for a tensor's values."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in READS
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("values_unread", "waits_to_log")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("method", ["GradDotProd", "Regular"])
def test_a_step_reads_no_values_between_logging_steps(
    method: str,
    optimizer: str,
    accumulation: int,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TrainingState, "save", lambda *args: None)
    step, counts = Trainer._step, []

    def counted(self: Trainer, number: int) -> None:
        with Reads() as reads:
            step(self, number)
        counts.append(reads.count)

    monkeypatch.setattr(Trainer, "_step", counted)
    flags = {"method": method, "optimizer": optimizer, "gradient_accumulation_steps": accumulation}
    run = start(
        data, tmp_path, run_name="a", max_steps=6, log_interval=3, dot_prod_save_interval=100, **flags
    )
    assert run.status == 0
    first = method == "GradDotProd"  # in which the guard looks
    assert [count > 0 for count in counts] == [first, False, True, False, False, True], counts
