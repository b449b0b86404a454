"""Triplets (long context, short context, question): their file format, where they come from, and how a prompt is made.

triplets.py   the dataclass and its JSONL file
tasks/        triplets made on the fly, and how their answers are scored
extract.py    the short context of a triplet that has none
prepare.py    triplets from raw documents
chat.py       a context and a question as the token ids of one user turn
prompts.py    the stream of prompts that training reads
"""
