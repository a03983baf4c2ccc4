"""Tokens as bytes: a character may take several tokens, none of which is a text on its own."""

import re

from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's, of a character that its vocabulary lacks
SPACE = "\u2581"  # as SentencePiece writes it


def byte_characters() -> dict[str, int]:
    """How byte-level BPE writes bytes: those that can be seen as themselves, the others from U+0100 on.

    >>> byte_characters()["A"], byte_characters()["\u0120"]
    (65, 32)
    """
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(others)}


class Pieces:
    """What tokens add to a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        steps = "" if decoder is None else decoder.__getstate__().decode()
        self._characters = byte_characters() if '"ByteLevel"' in steps else {}
        self._spaced = SPACE in steps
        self._special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}

    def __call__(self, token: int) -> tuple[str, bytes]:
        """A token, as OpenAI's `bytes:\\xe2` where it is no whole text, and its bytes: a special one's are none."""
        piece = str(self.tokenizer.convert_ids_to_tokens(token) or "")
        if token in self._special:
            return piece, b""
        found = self._bytes(token, piece)
        try:
            return found.decode(), found
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), found

    def _bytes(self, token: int, piece: str) -> bytes:
        if self._characters:
            known = [self._characters.get(character) for character in piece]
            return piece.encode() if None in known else bytes(byte for byte in known if byte is not None)
        if self._spaced:
            byte = BYTE.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()
