"""`ghostEngines.verify` on models with and without faults."""

import subprocess
from pathlib import Path

import pytest
import torch
from cases import D, T, V, Wired, seeded, tiny_llama, token_rows
from run_helpers import ROOT, python
from torch import Tensor, nn

import ghostEngines
from ghostEngines import RULES, RowsError, register_rule, verify
from ghostEngines.descriptions import PerPosition
from ghostEngines.verification import load, main


def test_an_exact_model_is_left_as_it_was() -> None:
    model, (x, y) = seeded(lambda: Wired(lambda m, h: m.out(m.lin(h).tanh()))), token_rows()
    model.out.weight.grad = torch.ones(V, D, dtype=torch.float64)
    report = verify(model, (x, y), val_batch_size=2)
    assert report.exact and str(report).endswith("5 rows: exact")
    assert [line.name for line in report.gradients] == [name for name, _ in model.named_parameters()]
    assert model.out.weight.grad.eq(1).all() and model.lin.weight.grad is None


def test_a_hugging_face_model_with_labels() -> None:
    x = torch.randint(V, (4, T))
    assert verify(tiny_llama(1), {"input_ids": x, "labels": x}).exact


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def test_a_wrong_rule_is_named() -> None:
    @register_rule(Scale, parameters=("w",))
    def scale(layer: Scale, inputs, backprops: Tensor) -> dict:
        return {"w": PerPosition(backprops * inputs[0] * 1.01)}

    try:
        report = verify(seeded(lambda: Wired(lambda m, h: m.out(m.lin(h)), Scale)), token_rows())
    finally:
        del RULES[Scale]
    assert not report.exact and "WRONG: lin.w, dot products" in str(report)


def test_rows_that_one_half_would_not_tell_apart() -> None:
    """Two rows in each other's place: verify separates every two of them."""

    def run(m: Wired, h: Tensor) -> Tensor:
        order = torch.arange(len(h))
        if len(h) > 1:
            order[[0, 1]] = order[[1, 0]]
        return m.out(m.lin(h[order])[order])

    with pytest.raises(RowsError, match="at other rows"):
        verify(seeded(lambda: Wired(run)), token_rows())


BUILD = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, mixes):
        super().__init__()
        self.wte, self.out, self.mixes = nn.Embedding(11, 6), nn.Linear(6, 11), mixes

    def forward(self, x):
        h = self.wte(x)
        return self.out(h + h.mean(0, keepdim=True) if self.mixes else h)

def build(mixes=False):
    return Model(mixes).double(), tuple(torch.randint(11, (2, 4, 5)))

def mixing():
    return build(True)

def nothing():
    return 1
"""


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [
        ("mine.py:build", 0, "4 rows: exact"),
        ("mine.py:mixing", 1, "refused: the loss of a row has a gradient at other rows"),
        ("mine.py:nothing", 2, "must return (model, batch)"),
        ("mine.py:none", 2, "has no 'none'"),
        ("there_is_none:build", 2, "No module named 'there_is_none'"),
        ("mine.py", 2, "give FILE.py:FUNCTION"),
    ],
)
def test_the_command(
    where: str, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(BUILD)
    if where.startswith("mine"):
        where = f"{tmp_path}/{where}"
    assert main([where]) == status
    shown = capsys.readouterr()
    assert said in shown.out + shown.err


def test_the_command_as_a_user_runs_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BUILD)
    command = python("-m", "ghostEngines.verify", tmp_path / "mine.py:build")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "exact" in done.stdout and not done.stderr, done.stderr


def test_the_lines_of_readme() -> None:
    """As they stand there, with a Hugging Face Llama."""
    section = (ROOT / "README.md").read_text().partition("## In your own loop")[2]
    lines = section.partition("```python\n")[2].partition("```")[0]
    model, (x, y) = tiny_llama(), token_rows()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    names = {"model": model, "optimizer": optimizer, "m": 2, "X": x, "Y": y}
    exec(lines, names)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plain = ghostEngines.per_sample_losses(lambda x: model(input_ids=x), x[:3], y[:3])
    plain.mean().backward()
    assert names["dots"].shape == (3,)
    for name, p in model.named_parameters():
        assert (p.grad - gradients[name]).norm() <= 1e-5 * p.grad.norm() + 1e-9


def test_the_example() -> None:
    assert verify(*load(str(ROOT / "examples" / "nanogpt.py:build"))).exact
