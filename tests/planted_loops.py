"""Layers that are not compiled and take the time that a test says."""

from accel import time_cache, timed_chains, timing_loops


def plant_loops(monkeypatch, seconds, slower=lambda _layer: 1.0):
    """Lets a layer take ``seconds(layer, **arguments of compile_loop)``, times ``slower(layer)``.

    The first run in new buffers takes twice as long. Returns a list to which the layer is added,
    and what it took, each time that one is run, timed or not.
    """
    timed = []

    def compile_loop(layer, **arguments):
        return timing_loops.Loop((layer, seconds(layer, **arguments)), (), None, [None])

    class Buffers:
        def __init__(self, loop):
            self.new = True

        def seconds(self, loop, count):
            layer, alone = loop.program
            taken = count * alone * slower(layer) * (1 + self.new)
            self.new = False
            timed.append((layer, taken))
            return taken

    monkeypatch.setattr(time_cache, "compile_loop", compile_loop)
    monkeypatch.setattr(timed_chains, "compile_loop", compile_loop)
    monkeypatch.setattr(timing_loops, "_Buffers", Buffers)
    return timed
