"""The gradient of a batch, from its parts.

A part is a few rows: what it keeps stays near its core, where whole batches go through memory,
and each core has parts of its own. What comes out does not depend on how many cores there
are: parts are of one size, and are added up in their order.
"""

from __future__ import annotations

import threading

from llama3np import model
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
        tree, total = self.trained.params(params), _InOrder(params.like())
        rows = max(1, self.part // batch.ids_BT.shape[1])

        def task(i: int, _: int) -> None:
            part = Batch(*(array[i * rows : (i + 1) * rows] for array in batch))
            grad = params.like()
            into = self.trained.sums(params, grad)
            loss = backward.loss_and_gradients(
                tree, self.config, *part, into, OPS, BACK, self.recompute
            )
            total.add(i, loss, grad)

        with single_threaded_blas():
            self.pool.map(task, -(-len(batch.ids_BT) // rows))
        return total.loss, total.grad


class _InOrder:
    """A sum whose terms are added in their order, whichever comes first."""

    def __init__(self, zero: Flat):
        self.loss, self.grad = 0.0, zero
        self._lock, self._next = threading.Lock(), 0
        self._waiting: dict[int, tuple[float, Flat]] = {}

    def add(self, i: int, loss: float, grad: Flat) -> None:
        with self._lock:
            self._waiting[i] = loss, grad
            while self._next in self._waiting:
                loss, grad = self._waiting.pop(self._next)
                self.loss += loss
                self.grad.vector += grad.vector
                self._next += 1
