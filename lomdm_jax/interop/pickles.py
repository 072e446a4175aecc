"""PyTorch's own files, which are pickles, read without running what they say.

A pickle may name any function and have it called. torch.load(weights_only=True) allows tensors and
plain values only. Lightning's checkpoints hold a config of omegaconf and a tokenizer of
transformers besides; those classes, by name, become `Inert`, which does nothing. Whatever else a
file names is refused.
"""

import pathlib
import re
from typing import Any

from lomdm_jax.errors import UserError, one_line


class Inert:
    """Stands for an object of another package: it keeps its state and does nothing."""

    state: Any = None

    def __init__(self, *_: Any):
        pass

    def __new__(cls, *_: Any) -> "Inert":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


# What checkpoints of MDLM, BD3-LM and Duo name besides tensors, in files made with omegaconf 2.3
# and 2.4 and transformers 4.38 and 5.24; `dataloader` is those projects' own module.
_CLASSES = """
builtins.bool builtins.dict builtins.float builtins.int builtins.list builtins.str typing.Any
pathlib.PosixPath dataloader.Text8Tokenizer
omegaconf.base.ContainerMetadata omegaconf.base.Metadata
omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig
omegaconf.nodes.AnyNode omegaconf.nodes.BooleanNode omegaconf.nodes.FloatNode
omegaconf.nodes.IntegerNode omegaconf.nodes.StringNode
tokenizers.AddedToken tokenizers.Tokenizer tokenizers.models.Model
transformers.models.bert.tokenization_bert.BasicTokenizer
transformers.models.bert.tokenization_bert.BertTokenizer
transformers.models.bert.tokenization_bert.WordpieceTokenizer
transformers.models.bert.tokenization_bert_fast.BertTokenizerFast
transformers.models.gpt2.tokenization_gpt2.GPT2Tokenizer
transformers.models.gpt2.tokenization_gpt2_fast.GPT2TokenizerFast
transformers.tokenization_utils.Trie
""".split()
# What each name stands for while a file is read, and nothing else does.
HARMLESS: dict[str, Any] = dict.fromkeys(_CLASSES, Inert)
HARMLESS["collections.defaultdict"] = _empty_dict  # items may follow, which only a dict takes


def load(file: pathlib.Path) -> Any:
    """What a file of torch.save holds: tensors on the CPU, plain values and `Inert`.

    Raises:
      UserError: torch is missing, the file cannot be read, or it names anything else than the
        harmless.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{file} is a file of PyTorch's own, which is read with PyTorch ({error}): "
            "pip install torch"
        ) from error
    allowed: list[Any] = [(stand_in, name) for name, stand_in in HARMLESS.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file gives is as various as the damage
        raise _refusal(file, error) from error


def _refusal(file: pathlib.Path, error: Exception) -> UserError:
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return UserError(
            f"{file} names {named[1]}, which is neither a tensor nor among the few harmless "
            "classes that are known: it is refused, for reading it might run anything. If you "
            "trust it, save its tensors as safetensors where it was made."
        )
    return UserError(f"{file} cannot be read ({one_line(error)}): copy it again.")


def values(held: Any) -> Any:
    """Plain values out of what omegaconf held: nested dicts and lists."""
    if isinstance(held, Inert):
        state = held.state if isinstance(held.state, dict) else {}
        return values(state.get("_content", state.get("_val")))
    if isinstance(held, dict):
        return {name: values(each) for name, each in held.items()}
    return [values(each) for each in held] if isinstance(held, list) else held
