"""A training small enough to be run whole, many times over, in a test."""

from unittest import mock

from llama3np.backend import CPU
from llama3np.config import Config
from llama3np.train import checkpoint, curve, loop, metrics, start
from llama3np.train.settings import Preset, Settings

SIZES = Config(
    dim=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=12, vocab_size=1,
    rope_pairing="half", tied=True,
)  # fmt: skip
SETTINGS = Settings(
    context=8, rows=3, steps=7, learning_rate=1e-2, warmup=0, eval_every=3, checkpoint_every=2
)
TEXT = "".join(f"{n} sheep and {n * n % 17} llamas\n" for n in range(20))


def begin(directory, text=TEXT, name="out", **order):
    """A training at step 0 in directory/name, of a model of SIZES."""
    (directory / "text.txt").write_text(text, encoding="utf-8")
    with mock.patch.dict(start.PRESETS, tiny=Preset(SIZES, SETTINGS)):
        start.begin(directory / name, start.Order([directory / "text.txt"], **order))
    return directory / name


def go_on(out, threads=1):
    """To the end; the curve is tested by itself, and takes longer than all the rest."""
    with mock.patch.object(curve, "draw"):
        return loop.train(out, CPU, threads)


def outcome(out):
    """All that an interruption must not change: metrics, checkpoint, model."""
    lines = metrics.read(out / loop.METRICS)
    for line in lines:
        line.pop("tokens_per_s", None)
    run, state = checkpoint.load(out / checkpoint.FILE, CPU)
    flats = [flat.vector.tobytes() for flat in (state.params, state.first, state.second)]
    told = (state.step, state.evaluated, state.val_loss, state.best)
    return lines, run, flats, told, (out / "model.safetensors").read_bytes()
