"""A Trainer that scores its training samples: any subclass of Hugging Face's Trainer, made by `scored`."""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from foundation.errors import UserError
from foundation.granularity import Granularity
from score_store.pieces import pieces_of
from score_store.run_folder import RunFolder
from score_store.run_writer import write_run
from score_store.samples import Sample

from ...covered_layers import cover
from ...engine_manager import GradDotProdManager
from ...losses import require
from ...passes import DirectionKind
from ...scoring import Scoring
from ...updates import unwrapped
from .batches import CausalBatches, PackedBatches
from .joint_forward import JointForward, Loss
from .losses import Batch
from .packing import packed_with_rows
from .refusals import check_trainer
from .run import RunOfTrainer
from .sample_ids import ROW, Identities, NumberedCollator, Origin, check_rows, numbered, tokens_of

GRADIENT = "gradient.pt"
"""In a checkpoint: a validation gradient that is used for several steps."""


def scored(base: type[Any]) -> type[Any]:
    """Return a subclass of a Trainer class, whose training also scores each training sample.

    Its constructor takes what `base` takes, and:

        score_against: the dataset of the validation rows, in the form of train_dataset. All of them go with each step,
            and m rows cost about as much as m train rows: choose few, such as `dataset.select(range(8))`.
        scores: the folder of the scores, which attribution.values, report, query and curate take.
        sample_id: the column of train_dataset with integer ids; None: a sample's id is its place in the dataset.
        group: the column with the samples' groups, such as their source; None: all are in one group.
        scoring: a `Scoring`; None: the audit at every 100th step, in-pass values.
        direction, granularity: of GradDotProdEngine.

    Training is what it would have been with `base`, and so are evaluation, checkpoints and logs. Each update's scores
    are of the rows that it was made of, and are replaced when the training resumes from a checkpoint before them. With
    AdamW and direction "auto" the first update has none: nothing is known of its scaling yet.

    Raises:
        UserError: options under which scores would not be those of the training (refusals.py).
    """
    if not (isinstance(base, type) and issubclass(base, Trainer)):
        raise UserError(f"scored() takes a subclass of transformers.Trainer, not {base!r}")
    is_sft = "SFTTrainer" in [each.__name__ for each in base.__mro__]
    if hasattr(base, "_prepare_dataset") and not is_sft:
        raise UserError(
            f"scored() takes Trainers whose loss is the cross entropy of the next tokens; of TRL's that is SFTTrainer "
            f"alone, and not {base.__name__}"
        )
    mixin = _ScoredSFT if is_sft else _Scored
    return type(f"Scored{base.__name__}", (mixin, base), {"__doc__": scored.__doc__, "base": base})


class _Scoring(TrainerCallback):
    """Tells a scored Trainer that its training begins, and that the optimizer is about to step."""

    def __init__(self, trainer: "_Scored") -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.begin_scoring()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.record_scores()


class _Scored(Trainer):
    """The methods of a Trainer that scoring changes; `scored` puts them before those of a base class."""

    base: type[Trainer]
    # Of Trainer, for the type checker.
    data_collator: Any
    loss_is_scaled_for_ga: bool | None
    train_dataset: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        score_against: Any,
        scores: str | Path,
        sample_id: str | None = None,
        group: str | None = None,
        scoring: Scoring | None = None,
        direction: DirectionKind = "auto",
        granularity: Granularity = "total",
        **kwargs: Any,
    ) -> None:
        self._names = sample_id, group  # of columns; SFTTrainer prepares its dataset within __init__
        super().__init__(*args, **kwargs)
        check_trainer(self, self.base.__name__)
        if not hasattr(self, "_identities"):
            self.train_dataset = self._numbered(self.train_dataset)
        self._scoring = Scoring(audit_interval=100) if scoring is None else scoring
        self._direction, self._granularity = direction, granularity
        self._validation_rows, self._folder = self._prepared(score_against), Path(scores)
        # What the base says of its loss; this class itself divides it where that is necessary.
        self._base_is_scaled, self.loss_is_scaled_for_ga = self.loss_is_scaled_for_ga, True
        self._coming: deque[Origin] = deque()  # of the micro-batches to come
        self._rows_of_update, self._norm = 0, None
        self._batches: CausalBatches
        self._run: RunOfTrainer
        self._losses: Tensor | None = None  # (N,) of the last pass
        self._manager: GradDotProdManager | None = None
        self._resumed_from: Path | None = None  # the checkpoint
        self._checked = False  # the loss was compared with that of `base`
        self.add_callback(_Scoring(self))

    def _numbered(self, dataset: Any) -> Any:
        """Return the train dataset with the column ROW, and keep the ids and groups of its rows."""
        self._identities = Identities.of(dataset, *self._names)
        return numbered(dataset)

    def _prepared(self, dataset: Any) -> list[dict[str, Any]]:
        """Return the validation rows as the collator takes them."""
        check_rows(dataset, "score_against")
        dataset = self._tokenised(dataset)
        rows = [dict(dataset[row]) for row in range(len(dataset))]
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            rows = [
                {k: v for k, v in row.items() if k in self._signature_columns and k != ROW} for row in rows
            ]
        return rows

    def _tokenised(self, dataset: Any) -> Any:
        """Return the dataset as the collator takes it."""
        return dataset

    def _tokens_of(self, row: int) -> list[int]:
        """Return the tokens of a sample that is packed into rows, by its place in the dataset."""
        raise UserError("packed rows come from SFTTrainer alone, which knows the samples in them")

    # The dataset and its batches

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ROW not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, ROW]

    def get_train_dataloader(self) -> Any:
        own, self.data_collator = self.data_collator, NumberedCollator(self.data_collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = own

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Begin an update: take the ids out of its batches, and tell the engine how many these are."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._coming = deque(batch.pop(ROW) for batch in batches)
        self._rows_of_update = sum(len(origin.rows) for origin in self._coming)
        if self.accelerator.num_processes > 1:
            rows = torch.tensor([self._rows_of_update], device=device)
            self._rows_of_update = int(self.accelerator.gather(rows).sum())
        if batches:
            self._scores.begin_step(self.state.global_step, len(batches))
        return batches, items

    # A micro-batch

    @property
    def _scores(self) -> GradDotProdManager:
        if self._manager is None:
            raise RuntimeError("scoring begins with train(): single training steps are not scored")
        return self._manager

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        if self._losses is None:
            raise UserError(
                f"{self.base.__name__}.training_step does not use compute_loss(), which is what scores"
            )
        self._scores.prepare_gradients(self._losses)
        self._losses = None
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of the base class, whose gradient is that of the joint batch's loss."""
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if not (self.is_in_train and self.model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, **options)
        if not self._coming:
            raise RuntimeError("compute_loss() was called more often than get_batch_samples() gave batches")
        origin = self._coming.popleft()
        half = self.accelerator.mixed_precision != "no" or self.model.dtype in (torch.bfloat16, torch.float16)
        joint = JointForward(
            model,
            self._scores,
            self._batches,
            self._loss(num_items_in_batch),
            lambda train, weights: self._attach(train, weights, origin),
            self.accelerator.autocast,
            labels=inputs.get("labels"),
            tolerance=None if self._checked else 3e-2 if half else 1e-3,
        )
        result = super().compute_loss(joint, inputs, **options)
        loss, outputs = result if return_outputs else (result, None)
        loss = joint.differentiable(loss / self._divisor(num_items_in_batch))
        self._losses, self._checked = joint.losses, True
        return (loss, outputs) if return_outputs else loss

    def _divisor(self, num_items_in_batch: Any) -> int:
        """Return what the base class divides a micro-batch's loss by, after compute_loss."""
        scaled = self._base_is_scaled
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return 1 if scaled else self.current_gradient_accumulation_steps

    def _loss(self, num_items_in_batch: Any) -> Loss:
        """Return how the base class makes the loss of a micro-batch."""
        divisor = self._divisor(num_items_in_batch)
        if num_items_in_batch is None or self._base_is_scaled is False:
            return Loss(None, 1 / divisor)
        averaged = self.args.average_tokens_across_devices
        return Loss(num_items_in_batch, (self.accelerator.num_processes if averaged else 1) / divisor)

    def _attach(self, train: Batch, weights: Tensor, origin: Origin) -> None:
        """Tell the manager of a micro-batch, and write the texts of samples that are new."""
        rows = origin.rows
        if (found := self._batches.rows(train)) != len(rows):
            raise UserError(
                f"a batch of {found} samples was made of {len(rows)} rows of the dataset: the collator must keep them "
                "one to one"
            )
        if self._by_word and "attention_mask" in train:
            require(
                train["attention_mask"][:, 0].all(),
                "scores by word need rows that are padded on the right, so that their parts are those of the tokens in "
                'order: set tokenizer.padding_side = "right".',
            )
        ids, groups = self._identities.ids[rows], [self._identities.group(row) for row in rows]
        self._scores.attach_train_batch(train, sample_ids=ids, domains=groups, blocks=ids, weights=weights)
        new = self._run.unseen(rows)
        texts = [origin.tokens[i] if origin.tokens else self._tokens_of(rows[i]) for i in new]
        self._run.keep([self._sample(ids[i], groups[i], own) for i, own in zip(new, texts, strict=True)])

    def _sample(self, number: int, group: str, tokens: list[int]) -> Sample:
        decode = partial(
            self.processing_class.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        metadata = {"pieces": pieces_of(decode, tokens)} if self._by_word else {}
        return Sample(int(number), decode(tokens), tokens, group=group, metadata=metadata)

    @property
    def _by_word(self) -> bool:
        return self._scoring.by_target or self._granularity == "token"

    # An update

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._norm

    def record_scores(self) -> None:
        """Record the scores of an update, before the optimizer's step."""
        norm = torch.as_tensor(self._norm, device=self.args.device)
        factor = torch.ones_like(norm)
        if self.args.max_grad_norm > 0:
            factor = (self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils does
        skipped = ~norm.isfinite()
        self._scores.aggregate_and_log(
            step=self.state.global_step,
            lr=max(float(group["lr"]) for group in self.optimizer.param_groups),
            clip_factor=torch.where(skipped, 1.0, factor),
            skipped=skipped,
            global_batch_size=self._rows_of_update,
        )

    # A training

    def begin_scoring(self) -> None:
        """Attach the engine, and make the folder of the scores or go on with it."""
        accelerator, model = self.accelerator, self.accelerator.unwrap_model(self.model_wrapped)
        self._batches, batch = self._validation(model)
        resumed = self.state.global_step or None
        self._check_folder(resumed)
        accelerator.wait_for_everyone()  # before one of them makes the folder
        self._run = RunOfTrainer(len(self._identities.ids))
        layers = list(cover(model).layers)
        # Before the folder is made: it may refuse the model.
        self._manager = GradDotProdManager(
            model,
            self.optimizer,
            validation=batch,
            scores=self._run,
            scoring=self._scoring,
            batches=self._batches,
            processes=accelerator.num_processes,
            autocast=accelerator.autocast,
            loss_scale=self._loss_scale,
            direction=self._direction,
            granularity=self._granularity,
            samples=self._batches.find_samples,
        )
        self._run.open(
            write_run(
                self._folder,
                optimizer=type(unwrapped(self.optimizer)).__name__,
                direction=self._direction,
                granularity=self._granularity,
                layers=layers,
                values="exact" if self._scoring.every_exact else "in_pass",
                by_target=self._scoring.by_target,
                validation=[
                    self._sample(number, "score_against", tokens_of(row))
                    for number, row in enumerate(self._validation_rows)
                ],
                settings=self._settings(),
                resume_from=resumed,
            )
        )
        if resumed is not None and resumed % self._scoring.refresh_interval != 0:
            self._load_gradient()

    def _settings(self) -> dict[str, Any]:
        """Return what distinguishes this run from others, besides its data."""
        args, scoring = self.args, self._scoring
        micro_batch = args.per_device_train_batch_size * self.accelerator.num_processes
        return {
            "trainer": self.base.__name__,
            "seed": args.seed,
            "batch_size": micro_batch * args.gradient_accumulation_steps,
            "validation_point": "lookahead" if scoring.lookahead else "current",
            "val_refresh_interval": scoring.refresh_interval,
        }

    def _check_folder(self, resumed: int | None) -> None:
        """Raise UserError where a new training would write into a run, or a resumed one has none."""
        there = RunFolder(self._folder).config.exists()
        if resumed is None and there:
            raise UserError(
                f"{self._folder} has the scores of a training: name another folder, remove it, or go on with it by "
                "train(resume_from_checkpoint=...)"
            )
        if resumed is not None and not there:
            raise UserError(
                f"{self._folder} has no scores, and the checkpoint is of a training with {resumed} steps: name the "
                "folder of its scores, or begin anew"
            )

    def _load_gradient(self) -> None:
        """Go on with the validation gradient of the checkpoint."""
        assert self._resumed_from is not None
        path = self._resumed_from / GRADIENT
        if not path.is_file():
            raise UserError(
                f"{path} is missing, the validation gradient that steps after this checkpoint use: it was written "
                f"without refresh_interval={self._scoring.refresh_interval}; resume from another checkpoint"
            )
        self._scores.load_state(torch.load(path, weights_only=True))

    def _validation(self, model: nn.Module) -> tuple[CausalBatches, Batch]:
        """Return the batch of the validation rows, and what to do with batches of its kind."""
        batch = self._prepare_inputs(self.data_collator(self._validation_rows))
        packed = "position_ids" in batch and "attention_mask" not in batch
        words = self.processing_class
        pad = words.eos_token_id if words.pad_token_id is None else words.pad_token_id
        batches = (PackedBatches if packed else CausalBatches)(model, pad)
        if not batches.counts(batch).all():
            raise UserError("score_against has a row without a target (all labels are -100): leave it out")
        return batches, batch

    def verification(self) -> tuple[nn.Module, Batch, Callable[[nn.Module, Batch], Tensor], dict[str, Any]]:
        """Return what `ghostEngines.verify` checks: the model, the first batch with the validation rows, the loss."""
        batches, validation = self._validation(self.model)
        train = self._prepare_inputs(next(iter(self.get_train_dataloader())))
        train = {key: value for key, value in train.items() if key != ROW}
        joint = batches.joined(train, validation)
        options = {"val_batch_size": batches.rows(validation), "samples": batches.find_samples}
        return self.model, joint, lambda _, batch: batches.losses(batch), options

    def _loss_scale(self) -> float:
        scaler = self.accelerator.scaler
        factor = 1.0 if scaler is None else float(scaler.get_scale())
        return factor / float(self.accelerator.gradient_accumulation_steps)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = None if checkpoint is None else Path(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, once all scores before it are on the disk of every process."""
        self._scores.merge()
        self.accelerator.wait_for_everyone()
        if self.args.should_save and (state := self._scores.state()):
            # Before the rest: a checkpoint that is whole has it.
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / GRADIENT)
        super()._save_checkpoint(model, trial)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()


class _ScoredSFT(_Scored):
    """The same for TRL's SFTTrainer, which tokenises and packs datasets."""

    def _tokenised(self, dataset: Any) -> Any:
        if self._skip_prepare_dataset:
            return dataset
        arguments = self.processing_class, self.args, False, self._formatting_func, "score_against"
        return self._prepare_dataset(dataset, *arguments)

    def _prepare_dataset(self, dataset: Any, processing: Any, args: Any, packing: Any, *more: Any) -> Any:
        """Return TRL's tokenised dataset, whose rows know the samples that are packed into them."""
        prepare, (_, name) = super()._prepare_dataset, more
        if name == "train":
            dataset = self._numbered(dataset)
            if packing:
                packed, self._whole = packed_with_rows(prepare, dataset, processing, args, *more)
                return packed
        return prepare(dataset, processing, args, packing, *more)

    def _tokens_of(self, row: int) -> list[int]:
        tokens: list[int] = self._whole[int(row)]["input_ids"]
        return tokens
