"""Score a model and a dataset of one's own: the shortest loop that is all there.

    PYTHONPATH=. python examples/plain_loop.py results/plain    # seconds; prints the best and the worst samples

Sentences about films are classified. A quarter of them are from a forum, where a third of the labels are wrong, and
count half in the loss. An update is made of up to three micro-batches of eight rows; the last one of an epoch is short.
"""

import random
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from attribution import read_run
from attribution.values import write_values
from ghostEngines import GradDotProdEngine, per_sample_losses
from score_store import Sample, write_run

GOOD, BAD = ["great", "lovely", "clever", "funny"], ["dull", "awful", "silly", "slow"]
OTHERS = ["film", "story", "cast", "end", "music", "was", "the", "so", "quite", "really"]
WORDS = [*GOOD, *BAD, *OTHERS]
ROWS, MICRO_BATCHES, LR = 8, 3, 0.5
SOURCES = {"reviews": 1.0, "forum": 0.5}  # what a row of each counts in the loss


def sentences(count: int, seed: int, forum: float) -> tuple[list[Sample], Tensor]:
    """Return sentences of five words and their labels (count,).

    Args:
        forum: the share of sentences that are from the forum.
    """
    draw, samples, labels = random.Random(seed), [], []
    for number in range(count):
        source = "forum" if draw.random() < forum else "reviews"
        good, wrong = draw.random() < 0.5, source == "forum" and draw.random() < 1 / 3
        words = [
            "the",
            draw.choice(OTHERS[:5]),
            "was",
            draw.choice(OTHERS[7:]),
            draw.choice(GOOD if good else BAD),
        ]
        label = int(good != wrong)
        text = f"{' '.join(words)} -> {['bad', 'good'][label]}"
        samples.append(Sample(number, text, [WORDS.index(word) for word in words], source, {"wrong": wrong}))
        labels.append(label)
    return samples, torch.tensor(labels)


class Classifier(nn.Module):
    """Map words (N, T) to logits (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.embedding(x).mean(1))


def main(folder: Path, epochs: int = 10) -> int:
    """Train, and return how many of the ten most harmful samples have a wrong label."""
    torch.manual_seed(0)
    (train, y), (validation, val_y) = sentences(140, 0, forum=0.25), sentences(16, 1, forum=0.0)
    x, val_x = (torch.tensor([sample.tokens for sample in each]) for each in (train, validation))
    importance = torch.tensor([SOURCES[sample.group] for sample in train])
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    engine = GradDotProdEngine(model, val_batch_size=len(validation), direction="auto")
    engine.attach(optimizer)

    with write_run(folder, optimizer="SGD", direction="auto", validation=validation) as run:
        run.samples.append(train)
        step = 0
        for _ in range(epochs):
            batches = torch.randperm(len(train)).split(ROWS)
            for first in range(0, len(batches), MICRO_BATCHES):
                update = batches[first : first + MICRO_BATCHES]
                engine.begin_update(micro_batches=len(update))
                all_rows = torch.cat(update)
                for number, rows in enumerate(update):
                    # The validation rows go with the first micro-batch.
                    own_x = x[rows] if number else torch.cat([x[rows], val_x])
                    own_y = y[rows] if number else torch.cat([y[rows], val_y])
                    weights = (
                        importance[rows] / importance[all_rows].sum()
                    )  # over the update they add up to 1
                    losses = per_sample_losses(model, own_x, own_y)
                    engine.joint_loss(losses, weights).backward()
                    engine.prepare_gradients()
                    if number == 0:
                        val_loss = losses[len(rows) :].detach().mean()
                    run.append(
                        step=step,
                        sample_ids=rows,
                        groups=[train[row].group for row in rows],
                        dot_products=engine.dot_products(),
                        train_losses=losses[: len(rows)].detach(),
                        val_loss=val_loss,
                        lr=LR,
                        clip_factor=1.0,  # with clipping, append after it
                        global_batch_size=len(all_rows),
                        row_weights=weights,
                    )
                optimizer.step()
                optimizer.zero_grad()
                step += 1
    engine.detach()

    values = write_values([read_run(folder)], folder / "values")
    best, worst = (table.to_pylist() for table in values.extremes("samples", 10))
    for title, rows_of in (("most helpful", best[:5]), ("most harmful", worst[:5])):
        print(title)
        for row in rows_of:
            print(f"  {row['value']:+.4f} nats  {row['domain']}: {train[row['sample_id']].text}")
    wrong = sum(train[row["sample_id"]].metadata["wrong"] for row in worst)
    print(f"of the ten most harmful samples {wrong} have a wrong label")
    return wrong


if __name__ == "__main__":
    main(Path(sys.argv[1]))
