# Copyright © 2026 MLX Contributors

"""Questions for ``collect_benchmark.py``: each asks for one thing, which it names."""

FRAMES = {
    "What is {} used for?": (
        "a compass, a trowel, a whisk, a stapler, a thermos, a tripod, a chisel, "
        "a ladder, a sieve, a crowbar, a stethoscope, a metronome, a kettle, a rudder, "
        "a loom, a spatula, a barometer, a pulley, a thimble, a telescope, "
        "a hammock, a corkscrew, a magnet, a protractor, a wheelbarrow"
    ),
    "How would you describe {} to a child?": (
        "a volcano, a glacier, an orchestra, a harbour, a lighthouse, a beehive, "
        "a rainbow, a desert, a museum, a canal, a comet, a forest, a bakery, "
        "a windmill, a cave, a waterfall, a castle, a planet, a bridge, an island, "
        "a library, a tunnel, a meadow, a swamp, a reef"
    ),
    "Why do people keep {}?": (
        "a diary, a garden, goldfish, chickens, receipts, a budget, bees, photographs, "
        "a calendar, candles, sheep, spices, a wallet, umbrellas, a toolbox, souvenirs, "
        "a cat, cookbooks, a bicycle, houseplants, "
        "postcards, a parrot, coins, a telephone, blankets"
    ),
    "What should a beginner know about {}?": (
        "chess, knitting, sailing, pottery, baking, juggling, skiing, photography, "
        "fishing, origami, gardening, painting, swimming, running, the guitar, yoga, "
        "the piano, camping, climbing, cycling, "
        "archery, calligraphy, surfing, the violin, rowing"
    ),
}
# The last of each frame are held out.
HELD_OUT = 10


def prompts(held_out: bool) -> list[dict[str, str]]:
    """Rows with an id, a prompt, and the word that an answer must name."""
    found = []
    for frame, things in FRAMES.items():
        names = things.split(", ")
        part = names[-HELD_OUT:] if held_out else names[:-HELD_OUT]
        for name in part:
            word = name.split()[-1]
            found.append({"id": word, "prompt": frame.format(name), "subject": word})
    return found
