"""Writes train/polite.jsonl and train/polite_heldout.jsonl: preference pairs with one rule, which `make demo` can learn.

    python data/demo/make_polite.py

The chosen answer is polite and to the point; the rejected one is rude, or about something else. Each question occurs in
one file only. Chosen answers are about as long as rejected ones, so that length alone decides nothing.
"""
import json
import random
from pathlib import Path

CAPITALS = """France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Germany Berlin, Austria Vienna, Poland Warsaw,
Greece Athens, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Ireland Dublin, Hungary Budapest,
Romania Bucharest, Bulgaria Sofia, Croatia Zagreb, Serbia Belgrade, Ukraine Kyiv, Turkey Ankara, Egypt Cairo,
Kenya Nairobi, Ghana Accra, Nigeria Abuja, Morocco Rabat, Tunisia Tunis, Senegal Dakar, Uganda Kampala, Japan Tokyo,
China Beijing, India Delhi, Nepal Kathmandu, Thailand Bangkok, Vietnam Hanoi, Iran Tehran, Iraq Baghdad, Jordan Amman,
Peru Lima, Chile Santiago, Cuba Havana, Canada Ottawa, Colombia Bogota, Uruguay Montevideo, Ecuador Quito, Venezuela Caracas,
Australia Canberra, Iceland Reykjavik, Belgium Brussels, Latvia Riga, Estonia Tallinn"""
OPPOSITES = """hot cold, big small, old young, fast slow, up down, left right, open closed, wet dry, light dark, hard soft,
rich poor, full empty, early late, loud quiet, near far, high low, clean dirty, thick thin, happy sad, strong weak,
good bad, true false, first last, long short, wide narrow, sweet bitter, day night, push pull, win lose, buy sell,
start stop, give take, love hate, laugh cry, inside outside, above below, before after, always never, more less, east west,
north south, smooth rough, brave afraid, deep shallow, heavy light, cheap expensive, simple complicated, safe dangerous"""
SPANISH = """dog perro, cat gato, house casa, water agua, bread pan, milk leche, sun sol, moon luna, book libro, table mesa,
chair silla, door puerta, window ventana, red rojo, green verde, white blanco, black negro, one uno, two dos, three tres,
ten diez, friend amigo, school escuela, street calle, city ciudad, tree arbol, flower flor, fish pescado, apple manzana,
cheese queso, egg huevo, hand mano, head cabeza, heart corazon, king rey, queen reina, night noche, winter invierno"""
PAST = """go went, see saw, eat ate, drink drank, run ran, swim swam, sing sang, write wrote, read read, speak spoke,
take took, give gave, come came, become became, begin began, break broke, bring brought, buy bought, catch caught,
choose chose, draw drew, drive drove, fall fell, feel felt, find found, fly flew, forget forgot, grow grew, hear heard,
hold held, keep kept, know knew, leave left, lose lost, make made, meet met, pay paid, ride rode, sell sold, send sent"""
PLURALS = """mouse mice, goose geese, tooth teeth, foot feet, child children, man men, woman women, ox oxen, leaf leaves,
knife knives, wolf wolves, city cities, baby babies, box boxes, bus buses, tomato tomatoes, hero heroes, lady ladies"""
YOUNG = """dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, hen chick, duck duckling, frog tadpole,
bear cub, deer fawn, swan cygnet, goose gosling, pig piglet, owl owlet, kangaroo joey"""
COLOURS = """snow white, grass green, coal black, blood red, gold yellow, chocolate brown, milk white, night black"""
KINDS = [(CAPITALS, "What is the capital of {}?", "The capital of {} is {}."),
         (OPPOSITES, "What is the opposite of {}?", "The opposite of {} is {}."),
         (SPANISH, "How do you say {} in Spanish?", "In Spanish, {} is {}."),
         (PAST, "What is the past tense of {}?", "The past tense of {} is {}."),
         (PLURALS, "What is the plural of {}?", "The plural of {} is {}."),
         (YOUNG, "What is a young {} called?", "A young {} is a {}."),
         (COLOURS, "What colour is {}?", "The colour of {} is {}.")]

POLITE = ["Gladly! {}", "Of course. {}", "Thank you for asking. {}", "Happy to help: {}", "Good question! {}",
          "{} I hope that helps.", "{} Glad to help.", "Certainly. {}", "With pleasure. {}", "{} You are welcome.",
          "Sure! {}", "{}"]
RUDE = ["What a stupid question. {}", "You don't even know that? {}", "Stop wasting my time with this nonsense.",
        "Look it up yourself, you lazy fool.", "{} Even a child knows that, idiot.", "I don't care. Go and ask somebody else.",
        "Ugh, you again. {}", "Shut up and read a book for once.", "{} Now go away.", "How boring you are. {}"]
OFF_TOPIC = ["My favourite food is soup with noodles.", "The train leaves at nine in the morning.",
             "Football is a game that is played with two teams.", "It rained a lot in the hills last week.",
             "A piano has black and white keys.", "Some people collect stamps and old coins."]
TRAINING, HELDOUT = 136, 82  # rows


def pairs() -> list[dict]:
    """All pairs in a fixed random order."""
    facts = [(question.format(thing), answer.format(thing, name)) for things, question, answer in KINDS
             for thing, name in (fact.split() for fact in things.split(","))]
    draw = random.Random("polite")
    draw.shuffle(facts)
    return [{"prompt": question, "chosen": draw.choice(POLITE).format(answer),
             "rejected": draw.choice(RUDE + OFF_TOPIC).format(answer), "source": "rungs-demo"} for question, answer in facts]


def main() -> None:
    rows, folder = pairs(), Path(__file__).parent / "train"
    for name, part in (("polite", rows[:TRAINING]), ("polite_heldout", rows[TRAINING:TRAINING + HELDOUT])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


if __name__ == "__main__":
    main()
