"""What a scored Trainer refuses, by name."""

from typing import Any

from foundation.errors import UserError

PROCESSES = ("NO", "MULTI_CPU", "MULTI_GPU")  # accelerate's names of what gradients are averaged over


def check_trainer(trainer: Any, name: str) -> None:
    """Raise UserError for options under which scores would not be those of the plain training.

    Dropout is refused by the engine, when it is attached.
    """
    args, accelerator, config = trainer.args, trainer.accelerator, trainer.model.config
    of_trl = {"loss_type": "nll", "packing": False, "padding_free": False} | vars(args)
    # transformers renames the option from 5.24 on.
    checkpoints = vars(args).get("activation_checkpointing") or args.gradient_checkpointing
    how = vars(args).get("activation_checkpointing_kwargs") or args.gradient_checkpointing_kwargs or {}
    adapters = trainer.model.peft_config.values() if hasattr(trainer.model, "peft_config") else ()
    refused = {
        "label_smoothing_factor: the loss is then not a mean over targets": args.label_smoothing_factor > 0,
        "neftune_noise_alpha: noise on the embeddings would differ with validation rows": (
            args.neftune_noise_alpha is not None
        ),
        "compute_loss_func: a loss of one's own is not known to be a weighted sum over the rows": (
            trainer.compute_loss_func is not None
        ),
        "reentrant checkpointing (use_reentrant=True)": bool(checkpoints and how.get("use_reentrant")),
        "torch_compile: a compiled model hides its layers": args.torch_compile,
        "use_liger_kernel: its fused head makes no gradient of single rows": args.use_liger_kernel,
        "auto_find_batch_size: it begins the training again": args.auto_find_batch_size,
        "several GPUs in one process (DataParallel): use torchrun": args.n_gpu > 1,
        f"training under {accelerator.distributed_type}": str(accelerator.distributed_type.value)
        not in PROCESSES,
        "loss_type='dft': its weights depend on the model": of_trl["loss_type"] == "dft",
        "packing_strategy='wrapped': its rows hold parts of samples that see each other": (
            bool(of_trl["packing"]) and args.packing_strategy == "wrapped"
        ),
        "padding_free with pad_to_multiple_of: what pads the row would look like samples": (
            bool(of_trl["padding_free"]) and args.pad_to_multiple_of is not None
        ),
        "a router's auxiliary loss (router_aux_loss_coef): it is no row's": (
            bool(config.to_dict().get("output_router_logits"))
        ),
        "encoder-decoder models: it is for causal language models": bool(config.is_encoder_decoder),
        "prompt learning (PEFT): its virtual tokens belong to all rows": (
            any(adapter.is_prompt_learning for adapter in adapters)
        ),
    }
    for what, is_so in refused.items():
        if is_so:
            raise UserError(f"a scored {name} refuses {what}")
    if trainer.processing_class is None:
        raise UserError("give processing_class=tokenizer: the texts of samples are kept with the scores")
