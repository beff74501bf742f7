"""Training itself: steps, validations, samples, checkpoints, from a checkpoint on.

A new training is one that goes on from the checkpoint of step 0, which start.py writes. So what a
resumed training does is what every training does, and comes out the same.
"""

from __future__ import annotations

import time
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama3np.backend import Device, namespace, on, use
from llama3np.errors import InputError
from llama3np.load.huggingface import SINGLE, tokenizer_of
from llama3np.params import Params, mapped
from llama3np.train import checkpoint, curve, evaluation, frozen, tokens
from llama3np.train.checkpoint import Run, State
from llama3np.train.lock import alone
from llama3np.train.metrics import Metrics
from llama3np.train.optimizer import AdamW, clip, learning_rate
from llama3np.train.parts import PART, BatchGradient
from llama3np.train.progress import Progress
from llama3np.train.result import as_read, replace_adapters, replace_weights
from llama3np.train.signals import Signals, Stopped
from llama3np.train.start import LESS_MEMORY, TOKENS
from llama3np.train.tokens import Batch

METRICS = "metrics.jsonl"
CURVE = "loss.png"
PROMPT_TOKENS = 16  # of the validation data, that samples go on from


class Result(NamedTuple):
    """What a call of `train` did."""

    steps: int  # done in all
    loss: float | None  # of the last step
    val_loss: float | None  # the last
    best_val_loss: float | None  # that of the model in OUT
    seconds: float  # of this call
    tokens_per_s: float | None  # over the steps of this call, validations apart
    signal: int | None  # that ended it before its last step


def train(out: Path, device: Device, threads: int) -> Result:
    """Go on with the training in OUT to its last step, or to Ctrl-C (SIGINT, SIGTERM, SIGHUP).

    Progress is told on stderr. However it ends, what is in OUT can be gone on with. Raises
    InputError for an OUT without a checkpoint or with another process at work, files that were
    changed since, a full disk, too little memory, and a loss that is not finite any more.
    """
    use(device)
    path = out / checkpoint.FILE
    checkpoint.load_run(path)  # before a lock is made where there is no training
    with alone(out), on(device):
        run, state = checkpoint.load(path, device)
        checkpoint.verify(out, run)
        settings = run.settings
        with Progress(state.step, settings.steps) as progress:
            try:
                return Training(out, run, state, device, threads, progress).go()
            except MemoryError:
                raise InputError(
                    f"{out}: memory is too small for {settings.rows} rows of {settings.context} "
                    f"tokens; {LESS_MEMORY}"
                ) from None


class Training:
    """One training in the middle of its course."""

    def __init__(
        self, out: Path, run: Run, state: State, device: Device, threads: int, progress: Progress
    ):
        settings = run.settings
        self.out, self.run, self.state, self.progress = out, run, state, progress
        self.settings, self.trained = settings, frozen.trained(run, device)
        self.dtype = np.dtype(run.origin["dtype"])  # of the weights in OUT
        self.data, self.validation = tokens.open_tokens(out / TOKENS)
        self.tokenizer = tokenizer_of(out)
        # A device runs one part after the other whatever thread asks, and fills up with all rows.
        on_cpu = device.kind == "cpu"
        self.gradient = BatchGradient(
            run.config,
            threads if on_cpu else 1,
            settings.recompute,
            PART if on_cpu else settings.rows * settings.context,
            self.trained,
        )
        self.adam = AdamW(settings.beta1, settings.beta2, settings.epsilon, settings.decay)
        self.signals = Signals()
        self.metrics = Metrics(out / METRICS, state.metrics)
        self.loss: float | None = None
        self.seconds = 0.0  # of steps

    # ---- the course ---------------------------------------------------------------------------

    def go(self) -> Result:
        """Run to the end or to a signal; write a checkpoint and draw the curve then."""
        began, first, stopped = time.perf_counter(), self.state.step, None
        self.restore()
        # What is not finite is looked for, and told in one sentence, not by NumPy's warnings.
        with self.signals, np.errstate(all="ignore"):
            try:
                self.to_the_end()
            except Stopped as signal:
                stopped = signal.number
            self.keep()
        self.metrics.close()
        self.draw()
        done, seconds = self.state.step - first, time.perf_counter() - began
        speed = round(done * self.settings.batch_tokens / self.seconds, 1) if done else None
        state = self.state
        return Result(
            *(state.step, self.loss, state.val_loss, state.best, round(seconds, 2), speed, stopped)
        )

    def to_the_end(self) -> None:
        """A validation where one is due, then a step, and so on; the last thing is a validation."""
        state, settings = self.state, self.settings
        while True:
            last = state.step == settings.steps
            if (last or state.step % settings.eval_every == 0) and state.evaluated < state.step:
                self.validate()
            if last:
                return
            self.step()
            if state.step % settings.checkpoint_every == 0:
                self.keep()

    # ---- a step -------------------------------------------------------------------------------

    def step(self) -> None:
        """Change the weights by the gradient of one batch."""
        began, state, s = time.perf_counter(), self.state, self.settings
        with self.signals.pure():
            loss, grad = self.gradient(state.params, self.batch())
            length = clip(grad, s.clip)
        self.refuse_infinite(loss, length)
        peak = s.learning_rate
        rate = learning_rate(state.step, peak, s.warmup, s.steps, s.floor * peak)
        moments = state.first, state.second
        self.adam.update(state.params, grad, *moments, rate, state.step + 1)
        state.step += 1
        self.loss = loss
        seconds = time.perf_counter() - began
        self.seconds += seconds
        speed = round(s.batch_tokens / seconds, 1)
        self.metrics.write(step=state.step, loss=loss, lr=rate, tokens_per_s=speed)
        self.progress.stepped(state.step, loss, speed, seconds)

    def batch(self) -> Batch:
        """The windows of this step."""
        s = self.settings
        return self.placed(
            tokens.batch(self.data, s.seed, self.state.step, s.batch_rows, s.context)
        )

    def placed(self, batch: Batch) -> Batch:
        """A batch as the backward pass takes it: ids on the host, all else beside the weights."""
        xp = namespace(self.state.params.vector)
        return Batch(batch.ids_BT, xp.asarray(batch.targets_BT), xp.asarray(batch.weights_BT))

    def refuse_infinite(self, loss: float, length: float) -> None:
        """Raise InputError if a loss or a gradient is not finite; the weights are unchanged."""
        if not (isfinite(loss) and isfinite(length)):
            raise InputError(
                f"{self.out}: step {self.state.step + 1}: the loss is {loss} and its gradient's "
                f"length {length}; the last checkpoint is kept; begin anew with a lower "
                f"--learning-rate than {self.settings.learning_rate:g}"
            )

    # ---- now and then -------------------------------------------------------------------------

    def validate(self) -> None:
        """Measure the loss on all of the validation data; keep the model if it is the best yet."""
        state, s = self.state, self.settings
        rows = max(1, self.gradient.part // s.context)
        with self.signals.pure():
            batches = map(self.placed, tokens.whole(self.validation, rows, s.context))
            pool = self.gradient.pool
            val_loss = evaluation.mean_loss(self.as_read(), self.run.config, batches, pool)
        self.refuse_infinite(val_loss, 0.0)
        state.evaluated, state.val_loss = state.step, val_loss
        self.metrics.write(step=state.step, val_loss=val_loss)
        lowest = state.best is None or val_loss < state.best
        if lowest:
            state.best = val_loss
            self.publish()
        self.progress.validated(state.step, val_loss, lowest)
        self.draw()
        self.sample()

    def as_read(self) -> Params:
        """The model of now as OUT has it, or would: rounded, on the device."""
        xp = namespace(self.state.params.vector)
        params = as_read(self.trained.on_host(self.state.params), self.dtype)
        return mapped(params, xp.asarray)

    def restore(self) -> None:
        """Write the model if someone has taken it away: that of now, for the best one is lost."""
        state = self.state
        if not (self.out / SINGLE).is_file():
            self.publish()
            state.best = state.val_loss if state.evaluated == state.step else None
            self.progress.say(
                f"{self.out / SINGLE}: was gone; it is the model of step {state.step} now, until a "
                "validation finds a better one"
            )

    def publish(self) -> None:
        """Make the weights of now the model in OUT; adapters alone are beside it."""
        params, rank = self.trained.on_host(self.state.params), self.settings.lora
        replace_weights(self.out, params, self.dtype)
        if rank is not None:
            replace_adapters(self.out, params, self.run.config)

    def keep(self) -> None:
        """Write a checkpoint, once what it says of the metrics is on the disk."""
        self.state.metrics = self.metrics.sync()
        checkpoint.save(self.out / checkpoint.FILE, self.run, self.state)

    # What follows may fail: it is for the eye, and not worth a training.

    def draw(self) -> None:
        """Draw the loss curve."""
        try:
            curve.draw(self.out / METRICS, self.out / CURVE)
        except Exception as error:
            self.progress.say_once(f"no {CURVE}: {error}")

    def sample(self) -> None:
        """Show how the model goes on from the beginning of the validation data."""
        if self.tokenizer is None:
            return
        length = min(PROMPT_TOKENS, max(1, self.settings.context // 2))
        prompt = self.validation.ids_M[:length].tolist()
        try:
            with self.signals.pure():
                text = evaluation.sample(
                    self.trained.on_host(self.state.params),
                    self.run.config,
                    self.tokenizer,
                    prompt,
                    seed=self.state.step,
                )
            self.progress.say("\n".join(f"  | {line}" for line in text.split("\n")))
        except Exception as error:
            self.progress.say_once(f"no sample: {error}")
