"""Text to token ids and back, for each vocabulary format a checkpoint comes with.

| function             | reads                                              | found in            |
|----------------------|----------------------------------------------------|---------------------|
| from_tokenizer_model | Llama 3's lines of base64 and rank                 | Meta's folders      |
| from_tokenizer_json  | byte-level BPE as the tokenizers library stores it | Hugging Face's      |
| from_gguf            | tokenizer.ggml.* metadata (llama-bpe and smollm)   | .gguf               |
| from_llama2c         | scored pieces with byte fallback                   | llama2.c's tok*.bin |

All of them give a `Tokenizer`. A vocabulary that would have to be guessed at is refused. tiktoken
is imported when the first byte-pair tokenizer is made, not here.
"""

from llama3np.tokenizer.base import StreamDecoder, Tokenizer
from llama3np.tokenizer.gguf import from_gguf
from llama3np.tokenizer.huggingface import from_tokenizer_json
from llama3np.tokenizer.llama2c import from_llama2c
from llama3np.tokenizer.llama3 import from_tokenizer_model

__all__ = [
    "StreamDecoder",
    "Tokenizer",
    "from_gguf",
    "from_llama2c",
    "from_tokenizer_json",
    "from_tokenizer_model",
]
