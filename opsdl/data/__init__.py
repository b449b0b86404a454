"""Triplets (long context, short context, question): their file format, where they come from, and how a prompt is made.

triplets.py   the dataclass and its JSONL file
needles.py    needle questions hidden in the real text of haystacks.py, made on the fly
prepare.py    triplets from raw documents: the model writes the question from a chunk of the document
chat.py       a context and a question as the token ids of one user turn
"""
