"""All architectures that `--architecture` offers, and the family of each."""

from transformers import PreTrainedConfig

from models.gpt2 import GPT2
from models.llama import LLAMA
from models.llava import LLAVA
from models.pythia import PYTHIA

FAMILIES = (GPT2, PYTHIA, LLAMA, LLAVA)
ARCHITECTURES = {name: family for family in FAMILIES for name in family.sizes}
AUTO = "auto"  # the architecture is what the model's folder says
BY_TYPE = {family.model_type: family for family in FAMILIES}


def architecture_config(architecture: str) -> PreTrainedConfig:
    """Return the Hugging Face configuration of one of ARCHITECTURES."""
    family = ARCHITECTURES[architecture]
    return family.config(family.sizes[architecture])
