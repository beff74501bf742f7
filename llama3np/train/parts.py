"""The gradient of a batch, from its parts.

A part is a few rows: what it keeps stays near its core, where whole batches go through memory,
and each core has parts of its own. What comes out does not depend on how many cores there
are: parts are of one size, and are added up in their order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from llama3np import model
from llama3np.backend import host_ids
from llama3np.config import Config
from llama3np.threads import Pool, single_threaded_blas
from llama3np.train import backward, tiles
from llama3np.train.flat import Flat
from llama3np.train.tokens import Batch
from llama3np.train.trained import Trained, Whole

PART = 512  # tokens; with 1024 a step took a third longer
# What a part is computed with; the plain operations give the same.
OPS = model.PLAIN._replace(attention=tiles.attention)
BACK = backward.PLAIN._replace(attention=tiles.backward)


class BatchGradient:
    """The gradient of a model's loss, on the threads of a pool.

    threads: how many work at a time. recompute: see backward.loss_and_gradients. part: tokens of a
    part, or those of one row if a row has more; it decides in which order numbers are added up.
    trained: what the parameters are; all weights if None.
    """

    def __init__(
        self,
        config: Config,
        threads: int = 1,
        recompute: bool = False,
        part: int = PART,
        trained: Trained | None = None,
    ):
        self.config, self.recompute, self.part = config, recompute, part
        self.trained = trained or Whole(config)
        self.pool = Pool(threads)

    def __call__(self, params: Flat, batch: Batch) -> tuple[float, Flat]:
        """The loss, and its gradient as a new Flat, of the parameters' dtype and on their device.

        batch: as backward.loss_and_gradients takes its arrays. Raises InputError for ids out of
        range.
        """
        tree, total = self.trained.params(params), _InOrder(self.pool.threads)
        host_ids(batch.ids_BT, self.config.vocab_size)  # a part would tell its own row
        rows = max(1, self.part // batch.ids_BT.shape[1])

        def task(i: int, _: int) -> None:
            part = Batch(*(array[i * rows : (i + 1) * rows] for array in batch))
            with total.turn(i) as add:
                grad = params.like()
                into = self.trained.sums(params, grad)
                loss = backward.loss_and_gradients(
                    tree, self.config, *part, into, OPS, BACK, self.recompute
                )
                add(grad, loss)

        with single_threaded_blas():
            self.pool.map(task, -(-len(batch.ids_BT) // rows))
        assert total.grad is not None, "a batch has a row at least"
        return total.loss, total.grad


class _InOrder:
    """A sum whose terms are added in their order, whichever comes first.

    Each term is as large as the model, so no more of them exist at a time than one for each thread
    and one that waits: who is further ahead begins later.
    """

    def __init__(self, threads: int):
        self.loss = 0.0
        self.grad: Flat | None = None  # once there is a term
        self._threads, self._next, self._broken = threads, 0, False
        self._changed = threading.Condition()
        self._waiting: dict[int, tuple[Flat, float]] = {}

    @contextmanager
    def turn(self, i: int) -> Iterator[Callable[[Flat, float], None]]:
        """Wait until there is room for term i; yield add(grad, loss) for it."""
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._broken or i - self._next <= self._threads)
            yield partial(self._add, i)
        except BaseException:  # this term never comes, so nobody has to wait for it
            with self._changed:
                self._broken = True
                self._changed.notify_all()
            raise

    def _add(self, i: int, grad: Flat, loss: float) -> None:
        with self._changed:
            self._waiting[i] = grad, loss
            while self._next in self._waiting:
                grad, loss = self._waiting.pop(self._next)
                self.loss += loss
                self.grad = self._sum(grad)
                self._next += 1
            self._changed.notify_all()

    def _sum(self, grad: Flat) -> Flat:
        if self.grad is None:
            return grad
        self.grad.vector += grad.vector
        return self.grad
