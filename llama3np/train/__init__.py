"""Training in plain array operations: the backward pass, AdamW, and the loop around them.

| module        | what                                                                          |
|---------------|-------------------------------------------------------------------------------|
| backward.py   | the gradient of model.py: one function per operation                          |
| tiles.py      | attention in fewer passes, and its gradient, in place of the plain ones       |
| flat.py       | all tensors of one kind in one vector; gradients.py: where gradients go       |
| parts.py      | the gradient of a batch on all threads, over backward.py, tiles.py            |
| trained.py    | what of a model is trained: all weights, or lora.py: adapters of frozen.py's  |
| optimizer.py  | AdamW, clipping, the learning rate                                            |
| vocabulary.py | tokenizers made from text                                                     |
| tokens.py     | token files, windows and batches, over texts.py; dialogs.py: chat data        |
| settings.py   | presets, hyperparameters, the first weights                                   |
| start.py      | the beginning: all that the loop needs, on disk                               |
| loop.py       | steps, validations, checkpoints, over evaluation.py, signals.py and lock.py   |
| checkpoint.py | what a training goes on from, over durable.py: files no crash leaves halved   |
| result.py     | the model that comes out                                                      |
| metrics.py    | metrics.jsonl; curve.py: loss.png; progress.py: what is told meanwhile        |

docs/training.md says how it is used.
"""
