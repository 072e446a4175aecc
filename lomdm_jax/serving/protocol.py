"""What the page asks of a model, what it is told, and what has to answer."""

from collections.abc import Generator
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from lomdm_jax.config import GIVEN, GRIDS
from lomdm_jax.sampling.best import SCORES

MAX_SEED = 2**31 - 1
Event = dict[str, Any]
Events = Generator[Event, None, None]
EVENTS = {
    "waiting": "`ahead`: how many requests are served before this one; comes again when it changes",
    "start": "`compiling`: whether the sampler has to be compiled first, which takes seconds; "
    "`count`: samples; `given`: a piece of text for each position, null where it is generated",
    "reveal": "`seconds` since the start; `calls`: network calls so far; `changes`: a list of "
    "[sample, position, piece, step, share, log_p] for what is new, with a null piece for what is "
    "hidden again. share: probability, by the order, that the position came next; log_p: "
    "log-probability of the token in nats",
    "end": "`trace`: all of it once more: the run, the settings, and of each sample its text, "
    "tokens, pieces, revealed (step, 0 if given), share, log_p, calls and length",
    "error": "`message`: what went wrong",
}


def _choice(choices: tuple[str, ...], description: str) -> Any:
    return Field(None, description=f"{description}: {', '.join(choices)}")


class Request(BaseModel):
    """What to generate. Settings that are left out have the defaults of `lomdm_jax/config.py`; the
    sampler that of the run."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    run: str = Field("", description="a name of /api/runs; empty for the first")
    prompt: str = Field("", description="starts every sample; [[N]] is a blank of N tokens")
    suffix: str = Field("", description="ends every sample")
    count: int = Field(1, ge=1, description="samples")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="a random one if left out")
    sampler: str | None = _choice((*SCORES, "ancestral"), "how positions are chosen")
    reveal: int | None = Field(None, ge=1, description="positions per network call at most")
    threshold: float | None = Field(None, ge=0, description="score that further ones must have")
    dependence: float | None = Field(
        None, ge=0, description="nats that a call may lose; no bound if left out"
    )
    steps: int | None = Field(None, ge=1, le=10_000, description="of the time grid")
    grid: str | None = _choice(GRIDS, "how the steps are spread")
    remask: float | None = Field(None, ge=0, le=1, description="masks tokens again; 0 for never")
    order_temperature: float | None = Field(None, gt=0, le=1000, description="of the positions")
    temperature: float | None = Field(None, ge=0, le=1000, description="of the tokens")
    top_k: int | None = Field(None, ge=0, description="likeliest tokens drawn from; 0 for all")
    top_p: float | None = Field(None, gt=0, le=1, description="their probability together")
    length: int | None = Field(None, ge=0, description="tokens per sample; 0 for the model's")
    block: int | None = Field(None, ge=0, description="positions per block; 0 for the order's")
    stop_at_eos: bool | None = Field(None, description="stop at the end of text")
    given: str | None = _choice(GIVEN, "how the prompt is read, on the ranked layout")


class Backend(Protocol):
    """What generates."""

    def runs(self) -> list[dict[str, Any]]:
        """The runs to choose from, the first by default: `name`, `order`, `layout`, `length`
        (tokens), `samplers` (of each, null or why this run has not got it) and `defaults` of the
        settings."""
        ...

    def stream(self, request: Request) -> Events:
        """The events from "start" to "end". Checks the request first, and does all that takes
        time only when iterated, always from the same thread; closing it stops the work.

        Raises:
          UserError: the request asks for what there is not.
        """
        ...
