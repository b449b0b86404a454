"""What needle questions are worded with, for each split: sentences and questions, the keys, and the numbers.

The two splits share none of them, so that an answer learnt in training helps with no item of the evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """A needle sentence, and the questions that ask for one number, all numbers of a key, or those of several keys."""

    needle: str
    one: str
    values: str
    keys: str


WORDINGS = {
    "train": (
        Wording(
            "The magic number for the {key} is {value}.",
            "What is the magic number for the {key}? Answer with the number only.",
            "What are the {count} magic numbers for the {key}? Answer with the numbers, separated by commas.",
            "What are the magic numbers for {keys}? Answer with the numbers, separated by commas.",
        ),
        Wording(
            "The code of the {key} is {value}.",
            "According to the text, what is the code of the {key}? Give just the number.",
            "According to the text, what are the {count} codes of the {key}? Give just the numbers in one line.",
            "According to the text, what are the codes of {keys}? Give just the numbers in one line.",
        ),
        Wording(
            "Remember that the {key} has ticket number {value}.",
            "Which ticket number does the {key} have? Reply briefly.",
            "Which {count} ticket numbers does the {key} have? Reply briefly with all of them.",
            "Which ticket numbers do {keys} have? Reply briefly with both of them.",
        ),
    ),
    "eval": (
        Wording(
            "The secret password of the {key} is {value}.",
            "What is the secret password of the {key} mentioned in the text? Answer briefly.",
            "What are all {count} secret passwords of the {key} mentioned in the text? Answer in one short sentence.",
            "What are the secret passwords of {keys} mentioned in the text? Answer in one short sentence.",
        ),
        Wording(
            "Serial number {value} was assigned to the {key}.",
            "What serial number was assigned to the {key}? Write the number alone.",
            "What {count} serial numbers were assigned to the {key}? Write them on a single line.",
            "What serial numbers were assigned to {keys}? Write them on a single line.",
        ),
        Wording(
            "Please note: the price listed for the {key} is {value} dollars.",
            "How many dollars is the price listed for the {key}? Keep the answer short.",
            "What are the {count} prices in dollars listed for the {key}? Keep the answer short.",
            "What are the prices in dollars listed for {keys}? Keep the answer short.",
        ),
    ),
}

# Modern things: no verse of the KJV speaks of them.
NOUNS = {
    "train": """accordion airplane backpack balloon banjo battery bicycle blender bookshelf bulldozer cabinet calculator
        camera canoe carousel cello computer cupboard drone elevator envelope escalator freezer guitar hammock harmonica
        helicopter jacket jigsaw keyboard kiosk lantern laptop lawnmower limousine locker marimba microphone mirror
        motorcycle notebook parachute piano printer projector puzzle racket refrigerator rocket saxophone scooter
        skateboard sofa stapler submarine suitcase teapot telescope thermometer toaster tractor trampoline trombone
        umbrella unicycle wheelbarrow""".split(),
    "eval": """ambulance aquarium armchair barometer briefcase bus calendar caravan chandelier chessboard clarinet
        dishwasher doorbell drill dumbbell fireplace flashlight forklift generator glider globe hairdryer handbag kayak
        lighthouse magnet mailbox mandolin mattress megaphone metronome microscope microwave minibus monitor oboe
        padlock paintbrush pendulum photocopier radiator radio robot sailboat satellite screwdriver sculpture sled
        snowboard stopwatch surfboard syringe tambourine telephone television toothbrush treadmill tricycle tuba
        typewriter ukulele vacuum violin windmill wristwatch xylophone yacht""".split(),
}  # fmt: skip

# Numbers of five digits, split by a residue that does not show.
NUMBERS = {
    "train": [number for number in range(10_000, 100_000) if number % 7 < 5],
    "eval": [number for number in range(10_000, 100_000) if number % 7 >= 5],
}
