"""
Make what a tracer consists of.

In:   the settings of a tracer.
Out:  its encoder, its recorder and its outbox.
The thread that makes the tracer. Imported with the first of them: it brings in most of the package, which a program
that imports us and records nothing has no use for.
"""

from __future__ import annotations

import logging  # noqa: F401 - for `log.warn`, which may be called where it is too late to import anything

from evalvault_sdk.capture.console import Console
from evalvault_sdk.capture.encode import Encoder
from evalvault_sdk.capture.nostage import NOWHERE
from evalvault_sdk.capture.plain import Limits
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.redact import Redactor
from evalvault_sdk.capture.sample import Sampling
from evalvault_sdk.config import Settings
from evalvault_sdk.delivery.outbox import Outbox, open_outbox
from evalvault_sdk.delivery.transport.base import Transport


def assembled(settings: Settings, transport: Transport | None = None) -> tuple[Recorder, Outbox]:
    """Return a recorder and the outbox that it records into; `transport` takes the place of what the settings say."""
    encoder = _encoder(settings)
    outbox = open_outbox(settings, transport, finish=encoder.finish)
    return _recorder(settings, outbox, encoder), outbox


def _encoder(settings: Settings) -> Encoder:
    return Encoder(
        Limits(
            max_attribute_bytes=settings.max_attribute_bytes,
            max_event_bytes=settings.max_event_bytes,
            max_depth=settings.max_depth,
            max_items=settings.max_items,
        ),
        Redactor(secrets=settings.scrub_secrets, personal=settings.personal_data),
        run_id=settings.run_id,
        content=settings.content,
        mask=settings.mask,
    )


def _recorder(settings: Settings, outbox: Outbox, encoder: Encoder) -> Recorder:
    queue = outbox.queue if settings.enabled else None
    sink = NOWHERE.setup.sink if queue is None else queue
    sampling = Sampling(
        rate=settings.sample_rate,
        keep_errors=settings.sample_keep_errors,
        keep_slow_ms=settings.sample_keep_slow_ms,
    )
    console = settings.console and queue is not None
    return Recorder(
        settings.run_id,
        Console(sink) if console else sink,
        encoder=encoder,
        put_draft=None if queue is None or console or sampling.rate < 1 else queue.put,
        sampling=sampling if sampling.rate < 1 else None,
        payload_store=settings.payload_store,
        traceback_frames=settings.traceback_frames,
        enabled=settings.enabled,
    )
