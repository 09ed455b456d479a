"""How much a server takes on at once: of one request, and of all that wait."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """Of each replica.

    max_rows         that one request may ask for or bring, or of sequences the steps of them all
    max_length       of one sequence, in steps
    max_body_bytes   of a request, and of one in JSON max_json_bytes: its numbers become objects of Python's, which take many
                     times the memory and all of the event loop's time; many rows come as .npy or Arrow
    queue_rows, queue_bytes   that wait, over all requests; who comes when they are full is told to come again (429)
    batch_rows       a batch that has so many leaves at once
    target_wait_s    and else when its oldest request has waited so long
    time_limit_s     from the arrival of a request to its answer, or to the next chunk of it (504)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_rows: int = Field(1_000_000, ge=1)
    max_length: int = Field(100_000, ge=1)
    max_body_bytes: int = Field(64 * 2**20, ge=1)
    max_json_bytes: int = Field(2 * 2**20, ge=1)
    queue_rows: int = Field(65_536, ge=1)
    queue_bytes: int = Field(512 * 2**20, ge=1)
    batch_rows: int = Field(256, ge=1)
    target_wait_s: float = Field(0.002, ge=0.0)
    time_limit_s: float = Field(30.0, gt=0.0)
