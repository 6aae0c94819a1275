"""What JAX does behind the scenes."""

import contextlib

import jax


@contextlib.contextmanager
def compilations():
    """Counts what XLA compiles inside the block."""
    seen = []

    def listen(event: str, duration: float, **details) -> None:
        del duration, details
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
