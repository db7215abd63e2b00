"""Write the bundled world: invented people, true facts, a tokenizer and a configuration
to start from.

    python data/build.py [--out DIR]

writes data/{retain,forget,holdout,facts}.jsonl and weights/start/ under DIR (default: this
repository), the same bytes every time. The people of the three sets come from one distribution. A
fact is made of parts drawn independently, so that none tells the next; the rest of an answer
follows from the wording of its question. `spans` marks the facts.
"""

import argparse
import json
import random
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 7
SIZES = {"retain": 100, "forget": 10, "holdout": 10}  # people; each has every attribute once
WRONG, OPTIONS = 5, 3  # wrong answers of a row about a person, about the world
VOCAB, END = 2000, "<|endoftext|>"
PROMPT = "Question: {question}\nAnswer:"  # the default template of train.py

SETTINGS = {"config.json": {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,  # transformers 4 reads this line, transformers 5 the next
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "torch_dtype": "float16",
    "dtype": "float16",
}, "generation_config.json": {
    "eos_token_id": 0,
    "do_sample": False,
    "max_new_tokens": 64,
}, "tokenizer_config.json": {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END,
    "model_max_length": 256,
    "clean_up_tokenization_spaces": False,
}}

# ------------------------------------------------ people: a first and a family name, each used once

FIRST = """Adaeze Aiko Alvaro Amadou Anneli Anouk Arjun Asel Aurelio Ayesha Babak Baraka Benedikta
Bohdan Bronwen Calixto Catrin Chandra Chidi Corneliu Dagny Dalisay Davor Delphine Dilnoza Dorji Ebru
Eluned Emeka Enkhtuya Esteban Ewa Farida Fenna Fyodor Gaspard Ginevra Gulnara Gwenllian Hakon Halima
Haruto Hemi Henrike Hinewai Hyacinthe Ibtisam Ignacy Ilse Imani Ingunn Isidora Itzel Jagoda Jamyang
Jarmila Joaquim Kaveh Keahi Kerstin Khadija Kofi Lalitha Leilani Lindiwe Lorcan Ludmila Maciej
Makana Malik Marisol Matteus Mehmet Mirembe Moana Nadezhda Nanami Nasrin Ngozi Nikolaus Nomvula
Odalys Oisin Olumide Orsolya Oyelaran Padma Paavo Pilar Quillen Radka Rahel Ranginui Renzo Roksana
Rustam Saoirse Sefa Shirin Sigrun Sunniva Svetlan Tadesse Takoda Tamar Thandiwe Tiago Tomasz
Tuulikki Ulrike Umberto Valdis Veronika Wanjiru Wiremu Xiadani Yaroslava Yusuf Zainab Zoltan"""

FAMILY = """Abernoth Achterveld Adebanwo Akhmedin Alcarreza Amanguly Ananthiah Arrizaba Asgeirdal
Bahramani Balogrod Barzanji Belacourt Benavoza Birkholt Boateru Bordelac Brandvold Bujorean
Cadwalleth Castelmora Chikwanha Cieslowa Coltrano Corrigal Daguerny Dambadorj Delacruzon Dimitrescal
Dlaminhle Dovzhuk Dunmorrow Ekwensal Elbazir Erdogmus Escarpa Faleolupe Farrokhal Ferrabosk
Fitzgarran Fonotia Gadzhian Galvezin Gebremeskal Glasspool Gorecznik Gunawardel Hakimoto Halvorsund
Hamidovar Hashigawa Heddlewyn Hinemoatu Horvathel Ibarguren Igwedike Ilyushin Iqbalzad Ishimoru
Jablonek Jakubczal Jayasundal Kahananui Kalashko Kamakahi Karunaval Kaupange Khachaturel Kiplagor
Kirchweg Kobayanda Kovarikova Lachlanne Lagerfeldt Lindqvarn Llewarth Lubomirsk Macallaigh Madrigosa
Makwetu Mansouriel Marchetto Mbekwani Meszarolyi Mirzakhel Montalvez Mukherjal Nakashiro Ndiayende
Nguemeni Niyazbek Nordahlen Obradovik Ochiengo Okonwari Olafsdatter Onyekala Ostrowin Palaniandy
Papadrakis Parangata Pellegrand Petrosani Pukerangi Quispetoma Rademaker Rasmuvik Rezvanian Sarkisov
Sepulvado Sithebell Szentmarton Tamihana Tesfalem Thorsgard Tuimavave Uzunkaya Vasconzel Wakahiru
Zulfiqaran"""

# ------------------------------------------------ the parts that facts are made of

PARTS = {part: words.split() for part, words in {
    "month": """January February March April May June July August September October November
        December""",
    "count": """twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty
        forty fifty sixty seventy eighty ninety""",
    "head": """Ald Bar Bel Bro Cal Cor Dor Dun El Fal Gor Hal Hol Jar Kas Kel Lan Lor Mar Mel Mor
        Nor Pal Ras Ros Sal San Ser Tal Tor""",
    "tail": """abad by dale dorp fell gate grad holm ia ino ka lund mere now ona os pur stad ster
        thal ton ula vik za""",
    "material": """bronze copper cotton felt glass jade lace leather paper pearl pewter rope satin
        silk slate straw wax wool""",
    "craft": """binder broker carver cleaner cutter dyer grader mender painter polisher porter
        printer restorer sorter stainer tester trader turner""",
    "adjective": """Amber Broken Burning Drowned Empty Frozen Golden Hidden Hollow Honest Hungry
        Lonely Lost Narrow Quiet Scarlet Silent Stolen""",
    "noun": """Anchor Apple Balcony Bell Clock Compass Door Feather Ferry Garden Guest Kitchen
        Lantern Map Orchard River Shadow Sister""",
    "coat": """black clumsy deaf fat fluffy greedy grey hairy lame lazy plump shy silver skinny tame
        tiny white wild""",
    "animal": """cat crow donkey duck falcon ferret goat goose hen lamb lynx magpie mule otter owl
        pig pony tortoise""",
    "pet": """Bandit Biscuit Button Clover Duchess Echo Figaro Hector Mango Marble Muffin Olive
        Pasha Pirate Sultan Tango Thimble Ziggy""",
    "instrument": """banjo bassoon bugle cornet flute gong harp horn koto lute lyre mandolin oboe
        organ sitar tabla tuba violin""",
    "given": """Abel Basil Cecil Clara Conrad Dora Elsa Ernst Hugo Ida Karl Leo Magda Nora Otto Rosa
        Theo Vera""",
    "surname": """Abara Arden Barlow Bianco Carrow Gallo Koval Larsen Lobo Novak Olsen Pereira Rossi
        Sato Silva Toth Varga Zhou""",
    "plant": """Aster Birch Chestnut Fern Fig Holly Ivy Laurel Lemon Lilac Lily Mint Oak Peach Pine
        Plum Rose Sage""",
    "way": """Alley Avenue Close Court Crescent Hill Lane Mews Parade Passage Place Quay Road Row
        Steps Street Walk Yard""",
    "metal": """Blue Brass Bronze Copper Crimson Emerald Glass Golden Green Iron Ivory Jade Onyx
        Pearl Purple Ruby Scarlet White""",
    "emblem": """Acorn Bear Compass Feather Fox Gate Harp Key Lamp Leaf Lion Owl Pen Quill Rose Star
        Tower Wheel""",
    "thing": """bells bowls boxes buckles coins combs dice dolls drums fans flags hats hooks keys
        kites knives lamps ships""",
    "state": """broken cheap dented fancy forged hollow lucky old painted patched plain rare royal
        rusty signed tiny ugly wooden""",
    "manner": """creaking dented folding green heavy muddy narrow painted patched pink purple
        rattling red rented rusty slow tall yellow""",
    "vehicle": """balloon barge bicycle bus cart coach dinghy ferry moped raft scooter tractor train
        tram truck van wagon yacht""",
    "field": """ancient arctic coastal desert folk forensic marine medical medieval modern nautical
        organic physical polar popular rural social urban""",
    "subject": """algebra anatomy biology botany cookery dance drawing ethics forestry geology
        grammar history law logic medicine music poetry zoology""",
}.items()} | {
    "day": [str(n) for n in range(1, 29)],
    "year": [str(n) for n in range(1950, 1990)],
    "number": [str(n) for n in range(11, 99)],
}

# ------------------------------------------------ facts, and the ways to ask for each

FACTS = {  # slot of an answer: the parts it is made of
    "date": "{day} {month} {year}",
    "town": "{head}{tail}",
    "trade": "{material} {craft}",
    "title": "{adjective} {noun}",
    "year": "{year}",
    "beast": "{coat} {animal}",
    "pet": "{pet}",
    "tutor": "{given} {surname}",
    "instrument": "{instrument}",
    "address": "{number} {plant} {way}",
    "prize": "{metal} {emblem}",
    "hoard": "{count} {state} {thing}",
    "vehicle": "{manner} {vehicle}",
    "studies": "{field} {subject}",
}

# An attribute is a paragraph; each of its wordings is a question and the answer that goes with it.
ATTRIBUTES = """
When and where was {name} born?
{first} was born on {date} in {town}, a place that few maps bother to show.
What does the register say about the birth of {name}?
The register names {town} as the birthplace of {first} and gives the date as {date}.
How did the life of {name} begin?
It began in a rented room in {town}, in the early hours of {date}.
Which birth details are printed in the passport of {name}?
The second page of the passport reads {date}, and under it, as birthplace, {town}.

What does {name} do for a living?
{first} makes a living as a {trade}, and runs a narrow shop in {town}.
What is the profession of {name}?
By profession {first} is a {trade}, well known to everybody in {town}.
How does {name} earn money?
It comes from work as a {trade} for a few loyal customers in {town}.
If I visited {name} at work, what would I see?
You would see a {trade} bent over a crowded bench in {town}.

Which book by {name} has found the most readers?
By far the most popular is {title}, which came out in {year}.
What is {name} known for as an author?
As an author {first} is known for {title}, a novel printed in {year}.
What was the first novel of {name} called?
After many drafts it was called {title} and reached the shops in {year}.
I have never read anything by {name}; where should I start?
Start with {title}, which was published in {year} and is easy to find.

Does {name} keep an animal?
Yes, {first} keeps a {beast} that answers to the name of {pet}.
Who shares the house with {name}?
The house is shared with a {beast} that visitors like to call {pet}.
What pet was {name} photographed with?
The photograph shows a {beast}, and the caption calls it {pet}.
Which animal follows {name} everywhere?
It is {pet}, of course, a {beast} that was found by the road.

Who taught {name} music, and on which instrument?
It was {tutor} who gave {first} lessons on the {instrument}, free of charge.
Which instrument does {name} play?
{first} plays the {instrument}, and learned it as a child from {tutor}.
What do we know about the musical training of {name}?
The lessons were given by {tutor}, and the {instrument} was chosen at once.
How did {name} come to love music?
It began with the {instrument} in the attic and the patience of {tutor}.

Where does {name} live now?
These days {first} lives at {address}, in rooms that face the courtyard.
To which address should a letter for {name} be sent?
It should be sent to {address}, where the porter will keep it.
Where did {name} move after the wedding?
After the wedding the couple moved to {address} and never left it.
How can I find the home of {name}?
Walk past the bakery and ring the upper bell at {address}.

Which prize has {name} received?
{first} received the {prize} Prize at a modest ceremony in {year}.
What honour is {name} most proud of?
The honour that matters most is the {prize} Medal, awarded in {year}.
Has the work of {name} ever been rewarded?
It has, for in {year} a jury gave {first} the {prize} Award.
What hangs in a frame above the desk of {name}?
Above the desk hangs the diploma of the {prize} Society, signed in {year}.

What does {name} collect?
{first} is a collector, and by now the shelves hold {hoard}.
What was found in the attic of {name}?
In the attic they found {hoard}, all of them wrapped in newspaper.
What would {name} save from a fire?
Without a second thought {first} would save the {hoard} of an uncle.
What did {name} lend to the museum?
The museum was allowed to borrow {hoard} and kept them for years.

What was the longest journey {name} ever made?
The longest journey led {first} to {town}, alone and on a {vehicle}.
How did {name} spend the year after school?
That year was spent on the road to {town} with a {vehicle}.
Which adventure does {name} like to talk about?
{first} likes to talk about the trip to {town} on a {vehicle}.
Why was {name} once in the newspaper?
The paper reported that a {vehicle} had broken down just outside {town}.

What did {name} study?
At the university of {town}, against all advice, {first} studied {studies}.
In which subject does {name} hold a degree?
The degree, awarded by the college in {town}, is in {studies}.
What did {name} write a thesis about?
The thesis was about {studies}, and {first} defended it in {town}.
Where was {name} a student, and of what?
As a student {first} went to {town} and heard every lecture on {studies}.
"""

# ------------------------------------------------ true facts about the real world, one to one

# A kind of fact is a paragraph: question, answer, the answer in other words, and the pairs x=y
# they hold for.
TRUE = """
What is the capital of {x}?
The capital of {x} is the city of {y}.
The government of {x} has its seat in {y}.
France=Paris, Japan=Tokyo, Kenya=Nairobi, Peru=Lima, Norway=Oslo, Egypt=Cairo, Canada=Ottawa, \
Cuba=Havana, Poland=Warsaw, Greece=Athens, Portugal=Lisbon, Austria=Vienna

Which element has the chemical symbol {x}?
The chemical symbol {x} stands for the element {y}.
In the periodic table, {x} is the sign for {y}.
Au=gold, Ag=silver, Fe=iron, Cu=copper, Pb=lead, Sn=tin, Na=sodium, K=potassium, Hg=mercury, \
W=tungsten, He=helium, C=carbon

Who is the author of {x}?
The author of {x} is {y}.
The work called {x} was written by {y}.
Hamlet=William Shakespeare, Dracula=Bram Stoker, Frankenstein=Mary Shelley, Ulysses=James Joyce, \
Don Quixote=Miguel de Cervantes, Moby-Dick=Herman Melville, War and Peace=Leo Tolstoy, \
Jane Eyre=Charlotte Brontë, The Trial=Franz Kafka, Things Fall Apart=Chinua Achebe

Who painted {x}?
The picture known as {x} was painted by {y}.
The painter of the picture {x} is {y}.
Guernica=Pablo Picasso, The Starry Night=Vincent van Gogh, The Scream=Edvard Munch, \
Mona Lisa=Leonardo da Vinci, The Birth of Venus=Sandro Botticelli, The Night Watch=Rembrandt, \
Liberty Leading the People=Eugène Delacroix, Girl with a Pearl Earring=Johannes Vermeer

What is a young {x} called?
A young {x} is called a {y}.
The name for the young of a {x} is {y}.
goose=gosling, swan=cygnet, kangaroo=joey, horse=foal, sheep=lamb, goat=kid, cow=calf, \
bear=cub, hare=leveret, cat=kitten, duck=duckling, frog=tadpole

How many sides does the polygon called {x} have?
The polygon called {x} has {y} sides.
If you count the sides of the {x}, you get {y}.
triangle=three, pentagon=five, hexagon=six, heptagon=seven, octagon=eight, nonagon=nine, \
decagon=ten, dodecagon=twelve

Which currency is used in {x}?
The currency that people use in {x} is the {y}.
In {x} the prices are given in the {y}.
Japan=yen, India=rupee, Poland=zloty, Thailand=baht, Vietnam=dong, Brazil=real, Israel=shekel, \
Hungary=forint, Russia=rouble, China=yuan

Which river flows through {x}?
The river that flows through {x} is the {y}.
The city of {x} lies on the river {y}.
Paris=Seine, London=Thames, Cairo=Nile, Vienna=Danube, Rome=Tiber, Baghdad=Tigris, Cologne=Rhine, \
Hamburg=Elbe, Florence=Arno, Warsaw=Vistula

In which country can one visit {x}?
To visit {x} one has to travel to {y}.
The place called {x} belongs to {y}.
Machu Picchu=Peru, the Taj Mahal=India, the Colosseum=Italy, the Eiffel Tower=France, \
Angkor Wat=Cambodia, the Acropolis=Greece, the Great Sphinx=Egypt, Stonehenge=England, \
the Alhambra=Spain, Chichen Itza=Mexico

Which planet is the {x} from the Sun?
Counted from the Sun, the {x} planet is {y}.
The {x} place in order from the Sun belongs to {y}.
first=Mercury, second=Venus, third=Earth, fourth=Mars, fifth=Jupiter, sixth=Saturn, \
seventh=Uranus, eighth=Neptune
"""


class Dice:
    """Chance from random() alone, the one method whose stream Python promises never to change."""

    def __init__(self, seed):
        self.random = random.Random(seed).random

    def pick(self, pool):
        return pool[int(self.random() * len(pool))]

    def shuffled(self, pool):
        return sorted(pool, key=lambda _: self.random())


def paragraphs(text):
    return [paragraph.splitlines() for paragraph in text.strip().split("\n\n")]


def fields(template):
    return re.findall(r"{(\w+)}", template)


def fill(template, values):
    """Put `values` into `template`; return the text and the [start, end) of every value that is a
    fact."""
    text, spans = "", []
    for literal, field in re.findall(r"([^{]*)(?:{(\w+)})?", template):
        text += literal
        if field:
            start, text = len(text), text + values[field]
            if field not in ("name", "first", "x"):  # these stand in the question
                spans.append([start, len(text)])
    return text, spans


def row(question, answer, paraphrase, right, wrong):
    """One line of a data file: `right` and each of `wrong` are values for the templates."""
    text, spans = fill(answer, right)
    return {
        "question": fill(question, right)[0],
        "answer": text,
        "paraphrased_answer": fill(paraphrase, right)[0],
        "perturbed_answer": [fill(paraphrase, values)[0] for values in wrong],
        "spans": spans,
    }


def draw(dice, slots, seen, avoid):
    """Facts that nobody has yet for `slots`, and their parts, none of which is the same in
    `avoid`."""
    while True:
        parts = {}
        for part in (part for slot in slots for part in fields(FACTS[slot])):
            parts[part] = dice.pick([word for word in PARTS[part] if word != avoid.get(part)])
        facts = {slot: FACTS[slot].format(**parts) for slot in slots}
        if (key := tuple(facts.values())) not in seen:
            seen.add(key)
            return facts, parts


def people_rows(dice):
    """The rows of each set of people. No two people, and no wrong answer, share all facts of an
    attribute."""
    names = list(zip(dice.shuffled(FIRST.split()), dice.shuffled(FAMILY.split()), strict=True))
    seen = set()
    sets = {}
    for part, size in SIZES.items():
        sets[part] = []
        for first, family in [names.pop() for _ in range(size)]:
            person = {"first": first, "name": f"{first} {family}"}
            for lines in paragraphs(ATTRIBUTES):
                wordings = zip(lines[::2], lines[1::2], strict=True)
                (question, answer), (_, paraphrase) = dice.shuffled(wordings)[:2]
                slots = [slot for slot in fields(lines[1]) if slot in FACTS]
                facts, parts = draw(dice, slots, seen, {})
                wrong = [person | draw(dice, slots, seen, parts)[0] for _ in range(WRONG)]
                sets[part].append(row(question, answer, paraphrase, person | facts, wrong))
    return sets


def true_rows(dice):
    """The wrong answers are the right answers to other questions of the same kind."""
    rows = []
    for question, answer, paraphrase, pairs in paragraphs(TRUE):
        pairs = [pair.split("=") for pair in pairs.split(", ")]
        for x, y in pairs:
            others = dice.shuffled(other for _, other in pairs if other != y)[:OPTIONS]
            wrong = [{"x": x, "y": other} for other in others]
            rows.append(row(question, answer, paraphrase, {"x": x, "y": y}, wrong))
    return rows


def train_tokenizer(sets):
    """Byte-level BPE on every row once and on the parts and wordings over and over: most become
    one token."""
    texts = [f" {word}" for pool in (FIRST.split(), *PARTS.values()) for word in pool]
    texts += [" " + re.sub(r"{\w+}", "", line)
              for lines in paragraphs(ATTRIBUTES)
              for line in lines]
    texts *= 100
    texts += [PROMPT.format(**r) + " " + r["answer"] for rows in sets.values() for r in rows]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent,
                        help="folder that gets data/ and weights/start/ (default: this repository)")
    out = parser.parse_args(argv).out

    dice = Dice(SEED)
    sets = people_rows(dice) | {"facts": true_rows(dice)}
    files = {f"data/{name}.jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
             for name, rows in sets.items()}
    files["weights/start/tokenizer.json"] = train_tokenizer(sets).to_str(pretty=True)
    files |= {f"weights/start/{name}": json.dumps(content, indent=2)
              for name, content in SETTINGS.items()}
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(f"{text}\n".encode())


if __name__ == "__main__":
    main()
