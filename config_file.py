"""The configuration of a run: every option is one field of `TrainingConfig`.

A new option is one new field and its use. Its flag, type, choices, bounds, help text, and its place in
config.json come from the field.

    config = resolve(TrainingConfig.from_command_line(sys.argv[1:]))  # no field is "auto" or None any more
"""

import os
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from data_processing.domain_lists import Selection, parse_domains, parse_set
from data_processing.tokenizers import TOKENIZERS
from foundation.errors import ConfigError
from foundation.flags import check_flags, flag, flag_parser, flags_of
from foundation.granularity import Granularity
from foundation.paths import expand_home
from ghostEngines.passes import DirectionKind
from ghostEngines.strategies import STRATEGIES
from models.architectures import ARCHITECTURES, AUTO
from run.method import METHODS
from score_store.run_folder import RunFolder
from score_store.schema import ValueKind

ROOT = Path(__file__).resolve().parent
OF_SCORES = (  # the flags that speak of scores
    "contraction", "score_granularity", "direction", "validation_point", "val_refresh_interval", "values",
    "exact_by_target", "audit_interval",
)  # fmt: skip

BY_DIRECTION = ("total", "token")  # granularities that need a direction, and no validation rows beside it


@dataclass(frozen=True)
class TrainingConfig:
    """All options of a run. [Brackets] name the value that an open field (None) is resolved to."""

    method: str = flag(
        "GradDotProd",
        "GradDotProd: train, and save every training sample's gradient dot product with the validation "
        "gradient; Regular: train only",
        choices=METHODS,
        group="Method and scores",
    )
    architecture: str = flag(
        "GPT2-Small",
        "model, in its published size; those called Tiny are for tests and quick looks; auto: what the model in "
        "--init_from is",
        choices=(*ARCHITECTURES, AUTO),
    )
    dot_prod_save_interval: int = flag(
        10,
        "steps between two writes of dot products to disk (every step is scored)",
        at_least=1,
        may_change=True,
    )
    contraction: str = flag(
        "auto",
        "how linear layers compute dot products: auto chooses by each layer's shape, the others are forced "
        "on all layers; the results differ by rounding only",
        choices=("auto", *STRATEGIES),
    )

    score_granularity: Granularity = flag(
        "total",
        "what is saved of a sample's dot product besides the total: pairwise, its part for each validation "
        "row; per_layer, its part for each layer; token, its part for each position of the row",
    )

    direction: DirectionKind = flag(
        "auto",
        "what training gradients are multiplied with: auto, the validation gradient with each entry weighed as "
        "the optimizer's step weighs it, so that values speak of that step (AdamW's first step then has no "
        "scores); gradient, the validation gradient itself",
    )

    validation_point: Literal["current", "lookahead"] = flag(
        "current",
        "where the validation gradient is taken: current, the parameters before the step, in training's own pass; "
        "lookahead, where the step would end without this batch's gradients, in a pass of its own",
    )
    val_refresh_interval: int = flag(
        1,
        "K, steps for which a validation gradient is used: with K above 1 the validation rows have a pass of their "
        "own in every K-th step, and cost a K-th",
        at_least=1,
    )
    values: ValueKind = flag(
        "in_pass",
        "what a value is: in_pass, of what the backward pass knows; exact, the sample's exact share of what the "
        "optimizer's step does, from passes of its own in every step",
    )
    exact_by_target: bool = flag(
        False,
        "also save each exact value's parts, one for each target of the row: what each word, as a target, did (needs "
        "--values exact, and costs disk space alone: 8 bytes a target and step)",
    )
    audit_interval: int | None = flag(
        None,
        "steps between two audits, which compare in-pass values with exact ones (steps 2, 5, 10, 20 and 50 are "
        "audited, too); 0: none [100; 0 with --parallel fsdp, whose parameters are divided]",
        at_least=0,
        may_change=True,
    )

    row_guard: bool = flag(
        True,
        "GradDotProd checks at the first step that rows do not depend on each other: two forward and backward "
        "passes more, once",
        may_change=True,
    )

    pile_data_dir: str | None = flag(
        None,
        "folder of token shards [environment variable PILE_DATA_DIR, else the demo corpus beside main.py: "
        "data/demo, or data/demo_bpe for Llama, whose vocabulary is smaller]",
        may_change=True,  # the shards' checksums may not
        group="Data",
    )
    llava_data_dir: str | None = flag(
        None,
        "folder of LLaVA records, for the LLaVA architectures: SPLIT.json, and images/ where their image paths start; "
        "the domains of a split are the first folders of these paths [environment variable LLAVA_DATA_DIR, else "
        "data/llava_demo beside main.py]",
        may_change=True,  # the checksums of its files may not
    )
    tokenizer: str = flag(
        "gpt2_bytes",
        "tokenizer of LLaVA records: gpt2, gpt2_bytes, or a tokenizer.json or its folder; shards say which one made "
        "them",
    )
    on_bad_record: Literal["error", "skip"] = flag(
        "error",
        "a LLaVA record that cannot be used (no image, a truncated or huge one, an unknown role, more tokens than a "
        "row): error, or skip, which counts such records and decodes every image once before the run",
    )
    train_set: str = flag("train", "training samples: SPLIT or SPLIT:DOMAINS, as in train:ArXiv,Pile-CC")
    val_set: str = flag("val", "validation rows and validation loss: SPLIT or SPLIT:DOMAINS")
    test_set: str = flag("test", "test loss: SPLIT or SPLIT:DOMAINS")
    domains: str | None = flag(
        None,
        "training domains: 'A,B', each block once an epoch, or drawn by weight, 'A:2,B:1'; here and in the "
        "sets a name with a comma or a colon is put in double quotes, and a double quote within these is "
        "written twice: '\"C4: news, en\":2,ArXiv:1' [all domains of the split that have a whole block, each "
        "block once an epoch]",
    )
    block_size: int = flag(1024, "tokens per sample", at_least=1)
    batch_size: int = flag(2, "training samples per micro-batch and process", at_least=1, may_change=True)
    gradient_accumulation_steps: int = flag(
        1,
        "micro-batches per step and process: as many times the batch size, in the memory of one (and, for "
        "GradDotProd, one more copy of the model's size)",
        at_least=1,
        may_change=True,
    )
    val_batch_size: int = flag(
        1, "validation rows that the dot products refer to: the same ones in every step", at_least=1
    )

    train_only: Literal["all", "projector"] = flag(
        "all",
        "the part of the model that is trained: all, of LLaVA without the vision tower, as in its second stage; "
        "projector, as in its first",
    )

    max_steps: int = flag(
        1000, "optimizer steps", at_least=1, may_change=True, group="Optimization (a published GPT-2 recipe)"
    )
    optimizer: Literal["AdamW", "SGD"] = flag("AdamW", "update rule")
    learning_rate: float = flag(6e-4, "highest learning rate, reached at the end of the warm-up", above=0)
    min_lr: float | None = flag(None, "learning rate after the cosine decay [learning_rate / 10]", at_least=0)
    warmup_step: int = flag(100, "steps of linear warm-up (a run may be shorter than that)", at_least=0)
    lr_decay_steps: int | None = flag(None, "step at which the cosine decay ends [max_steps]", at_least=1)
    weight_decay: float = flag(0.1, "weight decay, on matrices only", at_least=0)
    betas: tuple[float, float] = flag((0.9, 0.95), "decay rates of AdamW's two moments", at_least=0)
    grad_clip: float = flag(1.0, "norm that the gradient is clipped to; 0 turns clipping off", at_least=0)
    seed: int = flag(
        1337,
        "of the initial weights, the order of the data and the validation rows",
        at_least=0,
        at_most=2**32 - 1,
    )

    eval_only: bool = flag(
        False,
        "evaluate, write nothing and stop: the saved model of the run that --run_name names; without "
        "--run_name the untrained model",
        may_change=True,
        group="Evaluation and logging",
    )
    eval_interval: int = flag(100, "steps between two evaluations", at_least=1, may_change=True)
    eval_iter: int = flag(2, "batches per split in an evaluation", at_least=1, may_change=True)
    eval_bs: int | None = flag(
        None, "samples per batch in an evaluation [batch_size]", at_least=1, may_change=True
    )
    log_interval: int = flag(
        1, "steps between two records of loss, learning rate and speed", at_least=1, may_change=True
    )
    wandb_mode: Literal["disabled", "offline", "online"] = flag(
        "disabled", "Weights & Biases logging", may_change=True
    )
    wandb_project: str = flag("ghostEngines", "project at Weights & Biases", may_change=True)

    init_from: str | None = flag(
        None,
        "folder of a causal language model in Hugging Face format to start from (its dropout, if any, is set to "
        "0: all training here is without) [a freshly initialised model]",
        group="Start, checkpoints and resuming",
    )
    checkpoint_interval: int = flag(500, "steps between two checkpoints", at_least=1, may_change=True)
    keep_checkpoints: int = flag(
        2, "how many of the newest checkpoints are kept", at_least=1, may_change=True
    )
    resume: Literal["never", "always", "auto"] = flag(
        "never",
        "resume the run that --run_name names from its newest checkpoint: always (the same as --resume alone), or "
        "fail if there is none; auto, if there is one, else begin the run and replace nothing (a run that was "
        "stopped before its first checkpoint is renamed to RUN_NAME.stopped-1)",
        may_change=True,
        alone="always",
    )
    resume_from: str | None = flag(
        None,
        "resume from this checkpoint of the run, step_NNNNNN [the newest, with --resume]",
        may_change=True,
    )

    device: Literal["auto", "cpu", "cuda"] = flag(
        "auto", "auto: cuda where there is a GPU, else cpu", group="Machine and precision"
    )
    model_dtype: Literal["float32", "bfloat16", "float64"] = flag(
        "float32", "of parameters and optimizer state"
    )
    train_dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = flag(
        "auto",
        "of the forward and backward pass: the model_dtype, or, over float32 parameters, bfloat16 or float16 "
        "by autocast (float16 with loss scaling); auto: bfloat16 over float32 parameters on cuda, else the "
        "model_dtype",
    )
    parallel: Literal["ddp", "fsdp"] = flag(
        "ddp",
        "several processes: each with the whole model (DistributedDataParallel), or with its part of it "
        "(FSDP2, fully_shard)",
        may_change=True,
    )
    compile: bool = flag(False, "compile the model's blocks with torch.compile")
    activation_checkpointing: bool = flag(
        False,
        "keep only the blocks' inputs and recompute the rest in the backward pass: less memory",
        may_change=True,
    )
    tf32: bool = flag(
        False,
        "float32 matrix products, those of dot products too, in TF32 on GPUs that have it: faster, ten bits "
        "of mantissa",
    )

    results_dir: str | None = flag(
        None,
        "folder of all runs [environment variable RESULTS_DIR, else results beside main.py]",
        may_change=True,
        group="Results",
    )
    run_name: str | None = flag(
        None,
        "folder of this run in results_dir [made of method, architecture, batch size and UTC time]",
        may_change=True,
    )
    overwrite: bool = flag(False, "replace the run of this name if there is one", may_change=True)

    # No flag: the source of each value that resolve() filled in.
    resolved_from: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_command_line(cls, argv: list[str]) -> "TrainingConfig":
        """Parse the command line; on an error print it and exit with status 2."""
        about = "Train a language model and score every training sample by its effect on the validation loss."
        parser = flag_parser(cls, "main.py", about)
        arguments = vars(parser.parse_args(argv))
        try:
            return cls(**arguments)
        except ConfigError as error:
            parser.error(str(error))

    @property
    def result_dir(self) -> Path:
        """{results_dir}/{run_name}, of a resolved configuration."""
        assert self.results_dir is not None and self.run_name is not None, "not resolved"
        return Path(self.results_dir) / self.run_name

    @property
    def computes_scores(self) -> bool:
        """Whether the method writes dot products."""
        return METHODS[self.method].scores

    @property
    def own_validation_passes(self) -> bool:
        """Whether the validation rows have passes of their own, and are not in the joint batch."""
        return self.validation_point == "lookahead" or self.val_refresh_interval > 1

    @property
    def strategy(self) -> str | None:
        """The contraction strategy that --contraction forces on every layer; None for auto."""
        return None if self.contraction == "auto" else self.contraction

    @property
    def folder(self) -> RunFolder:
        """The paths in this run's folder, of a resolved configuration."""
        return RunFolder(self.result_dir)

    @property
    def model_folder(self) -> Path | None:
        """The folder in Hugging Face format that the model comes from; None for a new one; of a resolved
        configuration."""
        if self.eval_only and "run_name" not in self.resolved_from:
            return self.folder.model
        return None if self.init_from is None else Path(self.init_from)

    @property
    def resumes(self) -> bool:
        """Whether the run resumes from a checkpoint; --resume auto is settled earlier (run.folder)."""
        return self.resume == "always" or self.resume_from is not None

    @property
    def saved_model(self) -> Path | None:
        """The saved model that --eval_only evaluates, or None for the untrained one; of a resolved configuration."""
        assert self.eval_only
        return None if "run_name" in self.resolved_from else self.folder.model

    def validate(self) -> None:
        """Check what can be checked without data and model. Raises ConfigError at the first error."""
        check_flags(self)
        if max(self.betas) >= 1:
            raise ConfigError(f"--betas {self.betas[0]},{self.betas[1]}: both must be below 1")
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ConfigError(
                f"--min_lr {self.min_lr} is above --learning_rate {self.learning_rate}: lower it"
            )
        dtypes = ["auto", self.model_dtype]
        if self.model_dtype == "float32":
            dtypes += ["bfloat16", "float16"]
        if self.train_dtype not in dtypes:
            raise ConfigError(
                f"--train_dtype {self.train_dtype} does not go with --model_dtype {self.model_dtype}: "
                f"choose from {', '.join(dtypes)}"
            )
        self.selections()
        if self.architecture == AUTO and self.init_from is None and not self.eval_only:
            raise ConfigError(
                f"--architecture {AUTO} reads what the model is from its folder: give --init_from FOLDER, or the "
                "name of an architecture"
            )
        if self.run_name is not None and (
            self.run_name in (".", "..") or "/" in self.run_name or not self.run_name.isprintable()
        ):
            raise ConfigError(
                f"--run_name {self.run_name!r}: must be the plain name of a folder, of printable characters"
            )
        if self.parallel == "fsdp" and (self.compile or self.train_dtype == "float16"):
            raise ConfigError(
                "--parallel fsdp with --compile or --train_dtype float16 is not supported: use --parallel "
                "ddp, or leave them out"
            )
        self._check_data()
        self._check_scores()
        if self.lr_decay_steps is not None and self.lr_decay_steps <= self.warmup_step < self.max_steps:
            raise ConfigError(
                f"--lr_decay_steps {self.lr_decay_steps} is not after --warmup_step {self.warmup_step}: "
                "there would be no decay, but a jump; raise it, or leave it out"
            )
        self._check_endings()
        self._check_micro_batches()

    def selections(self) -> dict[str, Selection]:
        """Return the domains of "train", "val" and "test". Raises ConfigError for a flag that cannot be parsed."""
        found = {
            name: parse_set(f"--{name}_set", value)
            for name, value in (("train", self.train_set), ("val", self.val_set), ("test", self.test_set))
        }
        if self.domains is not None:
            if found["train"].domains is not None:
                raise ConfigError(
                    f"--train_set {self.train_set} and --domains {self.domains} both choose domains: give one"
                )
            found["train"] = parse_domains(self.domains, found["train"].split)
        return found

    def _check_data(self) -> None:
        """Check that no flag is given that the architecture's data do not have."""
        if self.architecture == AUTO:
            return
        if ARCHITECTURES[self.architecture].images:
            given = {"--pile_data_dir": self._is_given("pile_data_dir")}
            why = "is trained on LLaVA records (--llava_data_dir)"
        else:
            given = {
                "--llava_data_dir": self._is_given("llava_data_dir"),
                "--tokenizer": self.tokenizer != "gpt2_bytes",
                "--on_bad_record": self.on_bad_record != "error",
            }
            why = "is trained on shards, which are checked and say which tokenizer made them"
        for name, is_given in given.items():
            if is_given:
                raise ConfigError(
                    f"{name} with --architecture {self.architecture}: it {why}; leave {name} out"
                )

    def _is_given(self, name: str) -> bool:
        return getattr(self, name) is not None and name not in self.resolved_from

    def _check_scores(self) -> None:
        if not self.computes_scores:
            for name in OF_SCORES:
                default = next(spec.default for spec in flags_of(self) if spec.name == name)
                if getattr(self, name) != default and name not in self.resolved_from:
                    raise ConfigError(f"--method Regular computes no dot products: leave out --{name}")
            return
        if self.direction == "auto" and self.optimizer == "AdamW":
            self._refuse(
                "AdamW's direction",
                "use --direction gradient, or leave it out",
                {
                    "--contraction gram": self.contraction == "gram" and "it makes no validation gradient",
                    "--compile": self.compile and "a compiled block does not see AdamW's second moments",
                },
            )
        if self.score_granularity == "token" and self.contraction == "instantiate":
            raise ConfigError(
                "--score_granularity token with --contraction instantiate: it has the positions of a row together; "
                "use auto, gram or project"
            )
        if self.exact_by_target and self.values != "exact":
            raise ConfigError(
                f"--exact_by_target with --values {self.values}: it splits exact values; give --values exact, too"
            )
        if self.own_validation_passes:
            self._refuse(
                f"--validation_point {self.validation_point} --val_refresh_interval {self.val_refresh_interval}",
                "leave one of them out",
                {
                    "--parallel fsdp": self.parallel == "fsdp"
                    and "the parameters are divided among processes",
                    "--compile": self.compile and "a compiled block does not see the validation gradient",
                    "--contraction gram": self.contraction == "gram"
                    and "it needs the validation rows in every pass",
                    f"--score_granularity {self.score_granularity}": self.score_granularity
                    not in BY_DIRECTION
                    and "it needs the validation rows in every pass",
                },
            )
        if self.values == "exact" or (self.audit_interval or 0) > 0:
            self._refuse(
                "--values exact" if self.values == "exact" else f"--audit_interval {self.audit_interval}",
                "leave one of them out",
                {"--parallel fsdp": self.parallel == "fsdp" and "the parameters are divided among processes"},
            )

    @staticmethod
    def _refuse(what: str, advice: str, reasons: Mapping[str, str | bool]) -> None:
        """Raise ConfigError for the first flags that have a reason why they do not go with something."""
        for flags, reason in reasons.items():
            if reason:
                raise ConfigError(f"{what} with {flags}: {reason}; {advice}")

    def _check_endings(self) -> None:
        goes_on = self.resume != "never" or self.resume_from is not None
        if self.eval_only and (self.overwrite or goes_on):
            raise ConfigError(
                "--overwrite or --resume with --eval_only: an evaluation writes nothing; leave one of them "
                "out"
            )
        if self.eval_only and self.init_from is not None:
            raise ConfigError(
                "--init_from with --eval_only: it evaluates a run, or the untrained model; leave one out"
            )
        if goes_on and self.overwrite:
            raise ConfigError(
                "--resume and --overwrite: a run is resumed, or replaced; leave one of them out"
            )
        if self.resume == "auto" and self.resume_from is not None:
            raise ConfigError(
                f"--resume auto and --resume_from {self.resume_from}: the newest checkpoint, or this one; "
                "leave one of them out"
            )
        if goes_on and self.run_name is None:
            raise ConfigError("--resume: which run? give its --run_name")

    def _check_micro_batches(self) -> None:
        """Check what several micro-batches allow: their scores need the first one's validation gradient."""
        if self.gradient_accumulation_steps == 1 or not self.computes_scores:
            return
        several = f"--gradient_accumulation_steps {self.gradient_accumulation_steps}"
        if self.score_granularity not in BY_DIRECTION:
            raise ConfigError(
                f"{several} with --score_granularity {self.score_granularity}: pairwise scores need the "
                "validation rows in every micro-batch, and per-layer ones the two parts of the tied weight's "
                "validation gradient apart; use total or token, or a larger --batch_size"
            )
        if self.contraction == "gram":
            raise ConfigError(
                f"{several} with --contraction gram: it needs the validation rows in every micro-batch; use "
                "auto, instantiate or project"
            )
        if self.compile:
            raise ConfigError(
                f"{several} with --compile: a compiled block cannot keep the validation gradient; leave one "
                "of them out"
            )


def read_command_line(argv: list[str], *, heard: bool) -> TrainingConfig:
    """Parse the command line; on an error, or --help, print and exit.

    Args:
        heard: whether this process prints, as one of each machine does.
    """
    if heard:
        return TrainingConfig.from_command_line(argv)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return TrainingConfig.from_command_line(argv)


def resolve(
    config: TrainingConfig, environ: Mapping[str, str] = os.environ, now: datetime | None = None
) -> TrainingConfig:
    """Return `config` with every open field filled in, and `resolved_from` naming the sources of those values.

    `~` is expanded in paths, and folders become absolute. `domains` stays None for all domains: only the data
    has their names. Reads its arguments, torch.cuda and the working directory; creates nothing.

    Raises:
        ConfigError: --device cuda without a GPU; PILE_DATA_DIR or RESULTS_DIR needed, and set to nothing.
        UserError: a path begins with the name of a user who is not there.
    """
    device = _device(config)
    mixed = device == "cuda" and config.model_dtype == "float32"
    found: dict[str, tuple[Any, str]] = {  # field -> its value if it is open, and where that comes from
        "device": (device, "auto"),
        "train_dtype": ("bfloat16" if mixed else config.model_dtype, "auto"),
        "min_lr": (config.learning_rate / 10, "learning_rate / 10"),
        "lr_decay_steps": (config.max_steps, "max_steps"),
        "eval_bs": (config.batch_size, "batch_size"),
        "audit_interval": _audit_interval(config),
        "llava_data_dir": _folder(
            "llava_data_dir", config.llava_data_dir, ROOT / "data" / "llava_demo", environ
        ),
        "pile_data_dir": _folder("pile_data_dir", config.pile_data_dir, demo_corpus(config), environ),
        "results_dir": _folder("results_dir", config.results_dir, ROOT / "results", environ),
        "run_name": (_run_name(config, now or datetime.now(UTC)), "method, architecture, batch_size, time"),
    }
    is_open = {name for name in found if getattr(config, name) is None}
    is_open |= {name for name in ("device", "train_dtype") if getattr(config, name) == "auto"}
    values = {name: found[name][0] for name in is_open}
    for name in ("llava_data_dir", "pile_data_dir", "results_dir"):
        values[name] = os.path.abspath(found[name][0])
    if config.init_from is not None:
        values["init_from"] = expand_home(config.init_from, "--init_from")
    if config.tokenizer not in TOKENIZERS:
        values["tokenizer"] = os.path.abspath(expand_home(config.tokenizer, "--tokenizer"))
    sources = {name: found[name][1] for name in found if name in is_open}
    return replace(config, **values, resolved_from={**config.resolved_from, **sources})


def _audit_interval(config: TrainingConfig) -> tuple[int, str]:
    if not config.computes_scores or config.parallel == "fsdp":
        return 0, "fsdp" if config.computes_scores else "Regular"
    return 100, "default"


def demo_corpus(config: TrainingConfig) -> Path:
    """Return the folder of the demo corpus whose tokens the architecture's vocabulary has."""
    name = "demo" if config.architecture == AUTO else ARCHITECTURES[config.architecture].corpus
    return ROOT / "data" / name


def _device(config: TrainingConfig) -> str:
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise ConfigError(
            f"--device cuda: PyTorch {torch.__version__} sees no GPU on this machine; use --device cpu, or "
            "install PyTorch's CUDA wheel and see whether nvidia-smi lists the GPU"
        )
    return ("cuda" if there else "cpu") if config.device == "auto" else config.device


def _folder(name: str, given: str | None, default: Path, environ: Mapping[str, str]) -> tuple[str, str]:
    variable = name.upper()
    if given is not None:
        return expand_home(given, f"--{name}"), "flag"
    if variable not in environ:
        return str(default), "default"
    if not environ[variable]:
        raise ConfigError(f"the environment variable {variable} is empty: name a folder, or unset it")
    return expand_home(environ[variable], variable), f"environment variable {variable}"


def _run_name(config: TrainingConfig, now: datetime) -> str:
    time = f"{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03d}Z"  # the runs of a sweep start at once
    return f"{config.method}-{config.architecture}-bs{config.batch_size}-{time}"


def describe(config: TrainingConfig) -> str:
    """Return all fields as lines `name value (source)`, for the screen."""
    lines = []
    for spec in flags_of(config):
        source = f"  ({config.resolved_from[spec.name]})" if spec.name in config.resolved_from else ""
        value = getattr(config, spec.name)
        shown = f"{value:g}" if isinstance(value, float) else value
        lines.append(f"{spec.name:23s} {shown}{source}")
    return "\n".join(lines)
