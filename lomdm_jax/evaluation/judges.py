"""Language models that say how likely a text is, to judge what others have generated."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from lomdm_jax.config import saved_config
from lomdm_jax.errors import UserError, one_line
from lomdm_jax.evaluation.likelihood import make_scorer, over_batches
from lomdm_jax.objectives import make_objective
from lomdm_jax.objectives.nelbo import targets_of
from lomdm_jax.trained import load

# Of a pass: the logits of GPT-2's vocabulary are then 0.8 GB.
TOKENS = 4096


class Judged(NamedTuple):
    """What a judge finds of N texts.

    nats_N: negative log-likelihood of the tokens that count, float64.
    tokens_N: how many count, int64; a text without any has 0 nats.
    features_ND: float32, the last hidden state at the last token, zeros for an empty text; None
      from a judge that gives none.
    """

    nats_N: np.ndarray
    tokens_N: np.ndarray
    features_ND: np.ndarray | None


class Judge(Protocol):
    """protocol: which model it is and which tokens count, in words."""

    protocol: str

    def __call__(self, texts: Sequence[str]) -> Judged: ...


def make_judge(name: str, mesh: ConfigDict) -> Judge:
    """The judge that `generative.judge` names.

    mesh: the config section of the devices that a run of ours may use.

    Raises:
      UserError: there is none of this name, it cannot be loaded, or it gives no exact likelihood.
    """
    kind, _, place = name.partition(":")
    if kind == "hf" and place:
        return HuggingFaceJudge(place)
    folder = pathlib.Path(name).expanduser()
    if name and folder.is_dir():
        return RunJudge(folder, mesh)
    raise UserError(
        f"config.generative.judge is {name!r}, but it must be hf:NAME, a causal language model of "
        'Hugging Face, or the folder of a run with order "ar".'
    )


class HuggingFaceJudge:
    """A causal language model of the package `transformers`, in float32, on a GPU if there is one.

    Every token of a text but the first is predicted from those before it, as MDLM counts them
    (kuleshov-group/mdlm, diffusion.py: compute_generative_perplexity).
    """

    def __init__(self, name: str) -> None:
        """Takes a name on the hub, or a local folder.

        Raises:
          UserError: a package is missing, or the model or its tokenizer cannot be loaded.
        """
        self._torch, transformers = _packages(name)
        folder = pathlib.Path(name).expanduser()
        place = str(folder) if folder.is_dir() else name
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(place)
            model = transformers.AutoModelForCausalLM.from_pretrained(place)
        except Exception as error:  # the package raises no narrower kind
            raise UserError(
                f"config.generative.judge is 'hf:{name}', which cannot be loaded "
                f"({one_line(error)}): give a local folder that holds a causal language model and "
                "its tokenizer or, where there is a network, its name on the Hugging Face hub."
            ) from error
        self._device = "cuda" if self._torch.cuda.is_available() else "cpu"
        self._model = model.float().eval().to(self._device)
        self._limit = _limit(name, model.config)
        self.protocol = (
            f"hf:{name} in float32, texts re-tokenised by its own tokenizer and cut to "
            f"{self._limit:,} tokens; all tokens count but the first of a text, which nothing "
            "precedes; the ends of documents are no part of a text"
        )

    def __call__(self, texts: Sequence[str]) -> Judged:
        ids = self._tokenizer([*texts], truncation=True, max_length=self._limit)["input_ids"]
        lengths_N = np.array([*map(len, ids)], np.int64)
        nats_N = np.zeros(len(ids))
        features_ND = np.zeros((len(ids), self._model.config.hidden_size), np.float32)
        for rows_B in _alike(lengths_N):
            nats_N[rows_B], features_ND[rows_B] = self._pass([ids[row] for row in rows_B])
        return Judged(nats_N, np.maximum(lengths_N - 1, 0), features_ND)

    def _pass(self, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Nats [B] and features [B, D] of rows that are not empty; what fills up the shorter ones
        stands on the right, where no token sees it."""
        torch = self._torch
        rows = [torch.tensor(row) for row in ids]
        ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self._device)
        length_B = torch.tensor([*map(len, ids)], device=self._device)
        here_BL = torch.arange(ids_BL.shape[1], device=self._device) < length_B[:, None]
        with torch.inference_mode():
            found = self._model(
                input_ids=ids_BL,
                attention_mask=here_BL.long(),
                output_hidden_states=True,
                use_cache=False,
            )
            nll_BL = torch.nn.functional.cross_entropy(
                found.logits[:, :-1].transpose(1, 2), ids_BL[:, 1:], reduction="none"
            )
            nats_B = torch.where(here_BL[:, 1:], nll_BL, 0).double().sum(-1)
            last_BD = found.hidden_states[-1][torch.arange(len(ids)), length_B - 1]
        return nats_B.cpu().numpy(), last_BD.cpu().numpy()


def _packages(name: str) -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"config.generative.judge is 'hf:{name}', which needs the packages torch and "
            "transformers: python -m pip install torch transformers, or name the folder of a run "
            'with order "ar" instead.'
        ) from error
    return torch, transformers


def _limit(name: str, config: Any) -> int:
    """Tokens that the model can read."""
    limit = getattr(config, "max_position_embeddings", None)  # GPT-2 calls it n_positions as well
    if not limit:
        raise UserError(
            f"config.generative.judge is 'hf:{name}', whose config does not say how many tokens it "
            "reads (max_position_embeddings): use another model."
        )
    return int(limit)


def _alike(lengths_N: np.ndarray) -> Iterator[np.ndarray]:
    """Rows that are not empty, in batches of similar length: TOKENS tokens at most, or one row."""
    rows_N = np.argsort(-lengths_N, kind="stable")
    rows_N = rows_N[: np.count_nonzero(lengths_N)]
    while len(rows_N):
        count = max(1, TOKENS // int(lengths_N[rows_N[0]]))
        yield rows_N[:count]
        rows_N = rows_N[count:]


class RunJudge:
    """A run of ours that goes from left to right: one pass gives the exact likelihood of a piece.

    A text is re-tokenised by the run's tokenizer and cut into pieces of its `data.length`, each
    read without the others. All tokens count, those at the start of a piece too, unless the run
    was trained without them (`objective.ignore_first`).
    """

    def __init__(self, folder: pathlib.Path, mesh: ConfigDict) -> None:
        """Takes the run's folder, and the config section of the devices to use.

        Raises:
          UserError: it holds no such run.
        """
        config = saved_config(folder)
        _check_chain_rule(folder, config)
        config.mesh = mesh
        self._model = load(folder, config)
        generator = self._model.generator
        objective = make_objective(
            "order",
            mask_id=generator.mask_id,
            samples=1,
            eps=config.objective.eps,
            reconstruction_share=config.objective.reconstruction_share,
            one_pass=generator.one_pass,
        )
        self._scorer = self._model.jit(make_scorer(generator, objective, draws=1))
        self._ignore_first = config.objective.ignore_first
        without = " but the first of a piece" if self._ignore_first else ""
        self.protocol = (
            f'the run {folder} with order "ar", texts re-tokenised by its own tokenizer and read '
            f"in pieces of {config.data.length:,} tokens; all tokens count{without}; the ends of "
            "documents are no part of a text"
        )

    def __call__(self, texts: Sequence[str]) -> Judged:
        nats_N, tokens_N = np.zeros(len(texts)), np.zeros(len(texts), np.int64)
        model = self._model
        scored = over_batches(
            self._scorer, model.params, self._batches(texts), key=model.key(0), place=model.place
        )
        for batch, terms in scored:
            np.add.at(nats_N, batch["text"], terms.main.astype(np.float64))
            np.add.at(tokens_N, batch["text"], batch["counted"].sum(axis=-1))
        return Judged(nats_N, tokens_N, None)

    def _batches(self, texts: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """Batches of one shape; `text` is the number of the text that a piece [R] comes from.

        What fills up a piece stands on the right, where no token sees it.
        """
        length, mesh = self._model.config.data.length, self._model.mesh
        pieces = [
            (number, ids[start : start + length])
            for number, ids in enumerate(map(self._model.tokenizer.encode, texts))
            for start in range(0, len(ids), length)
        ]
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        rows = -(-max(1, TOKENS // length) // parts) * parts
        for start in range(0, len(pieces), rows):
            part = pieces[start : start + rows]
            tokens_RL = np.full((rows, length), -1, np.int32)
            text_R = np.zeros(rows, np.int32)
            for row, (number, ids) in enumerate(part):
                tokens_RL[row, : len(ids)], text_R[row] = ids, number
            counted_RL = targets_of(tokens_RL >= 0, self._ignore_first)
            yield {"tokens": np.maximum(tokens_RL, 0), "counted": counted_RL, "text": text_R}


def _check_chain_rule(folder: pathlib.Path, config: ConfigDict) -> None:
    if config.order.name != "ar" or config.model.layout != "own":
        raise UserError(
            f"config.generative.judge is the run {folder} with order.name = "
            f"{config.order.name!r} and model.layout = {config.model.layout!r}, which gives a "
            "bound of the likelihood at best: use a run with order.name = 'ar' and model.layout = "
            "'own', or hf:NAME."
        )
