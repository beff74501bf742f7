"""Text to token ids and back, for each vocabulary format a checkpoint comes with.

| function             | reads                                              | found in            |
|----------------------|----------------------------------------------------|---------------------|
| from_tokenizer_model | Llama 3's base64 and rank, Llama 2's sentencepiece | Meta's folders      |
| from_tokenizer_json  | BPE of bytes or, Llama 2's, of characters          | Hugging Face's      |
| from_gguf            | tokenizer.ggml.*: llama-bpe, smollm, and llama     | .gguf               |
| from_llama2c         | scored pieces with byte fallback                   | llama2.c's tok*.bin |

All of them give a `Tokenizer`. A vocabulary that would have to be guessed at is refused. tiktoken
and sentencepiece are imported when the first tokenizer that needs one is made, not here.
"""

from llama3np.tokenizer.base import StreamDecoder, Tokenizer
from llama3np.tokenizer.gguf import from_gguf
from llama3np.tokenizer.huggingface import from_tokenizer_json
from llama3np.tokenizer.llama2c import from_llama2c
from llama3np.tokenizer.model_file import from_tokenizer_model

__all__ = [
    "StreamDecoder",
    "Tokenizer",
    "from_gguf",
    "from_llama2c",
    "from_tokenizer_json",
    "from_tokenizer_model",
]
