"""Train a small hand-written GPT, in nanoGPT's style, on characters, with a value for every sample.

    PYTHONPATH=. python examples/nanogpt.py results/nanogpt    # under a minute; results/nanogpt/report.html
    python -m ghostEngines.verify examples/nanogpt.py:build    # check the engine on this model

The model is ordinary PyTorch, unaware of the engine. It has its own LayerNorm, optional biases, position
embeddings looked up once for all rows, and an output layer tied to the embedding.

Half of the text are sentences as the validation rows have them; a quarter are sums, and a quarter are sentences
whose letters are shuffled. At the end the values of all groups are printed, and the report is written.
"""

import random
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attribution import values
from attribution.report import command as report
from attribution.values_folder import Values
from ghostEngines import GradDotProdEngine, Scoring, per_sample_losses
from score_store import ExactRows, Sample, write_run

CHARACTERS = "\n +.0123456789=abcdefghijklmnopqrstuvwxyz"
VOCABULARY, BLOCK, WIDTH, HEADS, LAYERS = len(CHARACTERS), 32, 64, 4, 2
ROWS, VALIDATION_ROWS, SAMPLES = 8, 4, 160
LR, WARM_UP, CLIP = 3e-3, 20, 1.0


class LayerNorm(nn.Module):
    """Layer normalisation with an optional bias."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Block(nn.Module):
    """Attention and MLP, each with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(WIDTH, bias=False), LayerNorm(WIDTH, bias=False)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rows, positions, _ = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(rows, positions, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Map token ids (N, T) to logits (N, T, VOCABULARY)."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = LayerNorm(WIDTH, bias=True)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.ln_f(hidden))


def sentence(draw: random.Random) -> str:
    who, what = draw.choice(["cat", "dog", "cow", "hen"]), draw.choice(["sees", "hears", "likes"])
    return (
        f"the {who} {what} the {draw.choice(['red', 'old', 'big'])} {draw.choice(['barn', 'tree', 'road'])}."
    )


def addition(draw: random.Random) -> str:
    a, b = draw.randrange(10), draw.randrange(10)
    return f"{a} + {b} = {a + b}."


def shuffled(draw: random.Random) -> str:
    letters = sentence(draw)
    return "".join(draw.sample(letters, len(letters)))


WRITERS = {"sentences": sentence, "sums": addition, "shuffled": shuffled}


def samples(groups: list[str], seed: int) -> list[Sample]:
    """Return one sample of BLOCK + 1 characters for each group's name."""
    draw, found = random.Random(seed), []
    for number, group in enumerate(groups):
        text = ""
        while len(text) <= BLOCK:
            text += WRITERS[group](draw) + "\n"
        text = text[: BLOCK + 1]
        found.append(Sample(number, text, [CHARACTERS.index(letter) for letter in text], group))
    return found


def batch(of: list[Sample]) -> tuple[Tensor, Tensor]:
    """Return text x and targets y, (rows, BLOCK) each; y is the character after x."""
    tokens = torch.tensor([each.tokens for each in of])
    return tokens[:, :-1], tokens[:, 1:]


def build() -> tuple[GPT, tuple[Tensor, Tensor]]:
    """Return the model in float64 and a batch, for `ghostEngines.verify`."""
    torch.manual_seed(0)
    return GPT().double(), batch(samples(["sentences", "sums", "shuffled"] * 2, seed=0))


def main(folder: Path, steps: int = 200) -> dict[str, float]:
    """Train, write values and report, and return the mean value of each group's samples, in nats."""
    torch.manual_seed(0)
    train = samples(["sentences", "sums", "sentences", "shuffled"] * (SAMPLES // 4), seed=0)
    validation = samples(["sentences"] * VALIDATION_ROWS, seed=1)
    model, (val_x, val_y) = GPT(), batch(validation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    engine = GradDotProdEngine(model, val_batch_size=VALIDATION_ROWS, direction="auto")
    engine.attach(optimizer)
    audited = Scoring(audit_interval=20)  # steps 2, 5, 10, 20, 40, 50, 60, ...
    epochs: list[Tensor] = []
    with write_run(folder, optimizer="AdamW", direction="auto", validation=validation) as run:
        run.samples.append(train)
        for step in range(steps):
            if not epochs:
                epochs.extend(torch.randperm(SAMPLES).split(ROWS))
            rows = epochs.pop()
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1, (step + 1) / WARM_UP)
            x, y = batch([train[row] for row in rows])
            losses = per_sample_losses(model, torch.cat([x, val_x]), torch.cat([y, val_y]))
            optimizer.zero_grad()
            engine.joint_loss(losses).backward()
            engine.prepare_gradients()  # p.grad is the gradient of losses[:ROWS].mean()
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            clip_factor = (CLIP / (norm + 1e-6)).clamp(max=1.0)  # what clip_grad_norm_ multiplied by

            exact = None
            if audited.exact(step):  # before the optimizer's step, which it foresees
                found = engine.exact_values(
                    [partial(per_sample_losses, model, x, y)],
                    partial(per_sample_losses, model, val_x, val_y),
                    clip_factor=clip_factor.item(),
                    global_rows=ROWS,
                )
                exact = ExactRows(
                    found.values[0],
                    found.of_batch,
                    found.momentum,
                    found.decay,
                    found.measured,
                    found.cosine,
                )
            run.append(
                step=step,
                sample_ids=rows,
                groups=[train[row].group for row in rows],
                dot_products=engine.dot_products(),  # (ROWS,)
                train_losses=losses[:ROWS].detach(),
                val_loss=losses[ROWS:].detach().mean(),
                lr=engine.lr,
                clip_factor=clip_factor,
                global_batch_size=ROWS,
                null=not engine.scored,  # AdamW's first step has no dot products
                exact=exact,
            )
            optimizer.step()
            if step % 20 == 0:
                print(
                    f"step {step}: train loss {losses[:ROWS].mean():.3f}, validation loss {losses[ROWS:].mean():.3f}"
                )
    engine.detach()
    # In AdamW's first steps in-pass values say little: its second moments are of few gradients.
    for tool in (values, report):
        tool.main([str(folder), "--steps", f"{WARM_UP}:"])
    groups = Values.open(folder / "values").read("domains").to_pylist()
    return {group["domain"]: group["mean_value"] for group in groups}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
