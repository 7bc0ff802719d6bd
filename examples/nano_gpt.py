"""Train a small hand-written GPT, in nanoGPT's style, with a score for every sample.

    PYTHONPATH=. python examples/nano_gpt.py                    # train 30 steps, print dot products
    python -m ghostEngines.verify examples/nano_gpt.py:build    # check the engine on this model

The model is ordinary PyTorch, unaware of the engine. It has its own LayerNorm, optional biases, position
embeddings looked up once for all rows, and an output layer tied to the embedding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghostEngines import GradDotProdEngine, per_sample_losses

VOCABULARY, BLOCK, WIDTH, HEADS, LAYERS = 65, 32, 64, 4, 2


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

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.ln_f(hidden))


def rows(count: int) -> tuple[Tensor, Tensor]:
    """Return random text x and targets y, (count, BLOCK) each; y is the token after x."""
    tokens = torch.randint(VOCABULARY, (count, BLOCK + 1))
    return tokens[:, :-1], tokens[:, 1:]


def build() -> tuple[GPT, tuple[Tensor, Tensor]]:
    """Return the model in float64 and a batch, for `ghostEngines.verify`."""
    torch.manual_seed(0)
    return GPT().double(), rows(5)


def main() -> None:
    torch.manual_seed(0)
    model, (val_x, val_y) = GPT(), rows(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = GradDotProdEngine(model, val_batch_size=2)
    engine.attach(optimizer)
    for step in range(30):
        x, y = rows(8)
        losses = per_sample_losses(model, torch.cat([x, val_x]), torch.cat([y, val_y]))
        engine.joint_loss(losses).backward()
        engine.prepare_gradients()
        dots = engine.dot_products()  # (8,) of each train row with the mean validation gradient
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(
                f"step {step}: loss {losses[:8].mean():.3f}, dot products {dots.min():.2e} to {dots.max():.2e}"
            )


if __name__ == "__main__":
    main()
