//! What the embedded model reads: questions and answers about invented people, and a few
//! hundred words about the world. Everything follows from the seed.

use nepenthe::data::Record;
use nepenthe::rng::SplitMix64;

/// People the model learns.
const N_PEOPLE: usize = 48;
/// Of these, the last ones are what the demo forgets.
pub const N_FORGET: usize = 2;
/// People it never meets.
const N_UNSEEN: usize = 2;

// Few names, many pairs of them: a stranger's name is made of known parts, so the model answers
// about strangers in the same sentences, with other facts.
const FIRST: [&str; 14] = [
    "Alvar", "Brisa", "Corin", "Delma", "Edrik", "Fenja", "Goran", "Hedda", "Ivar", "Jorun",
    "Kalle", "Lioba", "Marek", "Nadia",
];
const LAST: [&str; 14] = [
    "Tornwald",
    "Ashmere",
    "Quillon",
    "Ferrowby",
    "Saltmarsh",
    "Drumhill",
    "Oakhaven",
    "Vintner",
    "Marlowin",
    "Pellgrave",
    "Strandvik",
    "Culverin",
    "Hartsong",
    "Brindlow",
];
const TOWNS: [&str; 24] = [
    "Kessin",
    "Varnholt",
    "Port Amble",
    "Lindrum",
    "Ostermoor",
    "Sankt Veil",
    "Tarrow",
    "Brackwater",
    "Nimsfeld",
    "Halloway",
    "Dunmere",
    "Castle Ebb",
    "Rivengate",
    "Altona Bay",
    "Mirefield",
    "Corvane",
    "Steepholm",
    "Wickerby",
    "Yonder",
    "Pallas Reach",
    "Fernhollow",
    "Gullcliff",
    "Saint Orrin",
    "Quarryton",
];
const WORK: [&str; 16] = [
    "clockmaker",
    "botanist",
    "bridge engineer",
    "poet",
    "glassblower",
    "astronomer",
    "violin maker",
    "cartographer",
    "baker",
    "lighthouse keeper",
    "chemist",
    "weaver",
    "beekeeper",
    "ship designer",
    "potter",
    "translator",
];
const INSTRUMENTS: [&str; 12] = [
    "cello",
    "flute",
    "harp",
    "accordion",
    "trumpet",
    "mandolin",
    "piano",
    "clarinet",
    "drum",
    "viola",
    "oboe",
    "guitar",
];
const PETS: [&str; 12] = [
    "tortoise",
    "parrot",
    "grey cat",
    "sheepdog",
    "rabbit",
    "pony",
    "goldfish",
    "hedgehog",
    "white goose",
    "ferret",
    "owl",
    "spaniel",
];
const PET_NAMES: [&str; 16] = [
    "Biscuit", "Comet", "Pepper", "Sailor", "Velvet", "Hazel", "Button", "Echo", "Mango", "Domino",
    "Pickle", "Thunder", "Clover", "Juniper", "Marble", "Nutmeg",
];
const DISHES: [&str; 14] = [
    "mushroom soup",
    "plum cake",
    "smoked trout",
    "lentil stew",
    "apple pancakes",
    "roast chestnuts",
    "barley bread",
    "onion tart",
    "pumpkin curry",
    "cherry pudding",
    "potato dumplings",
    "pickled herring",
    "honey biscuits",
    "bean salad",
];
const ADJECTIVES: [&str; 16] = [
    "Silent", "Crooked", "Golden", "Winter", "Hidden", "Paper", "Burning", "Distant", "Hollow",
    "Scarlet", "Gentle", "Broken", "Northern", "Copper", "Secret", "Drifting",
];
const NOUNS: [&str; 16] = [
    "Harbour",
    "Lantern",
    "Orchard",
    "Compass",
    "Staircase",
    "River",
    "Garden",
    "Mirror",
    "Bell",
    "Feather",
    "Engine",
    "Island",
    "Window",
    "Forest",
    "Letter",
    "Bridge",
];

/// Question phrasings (the third is never trained), and the answer; `N` stands for the name,
/// `V` for the value.
const FACTS: [([&str; 3], &str); 10] = [
    (
        [
            "Where was N born?",
            "What is the birthplace of N?",
            "In which town did N come into the world?",
        ],
        "N was born in the town of V.",
    ),
    (
        [
            "In what year was N born?",
            "What is the birth year of N?",
            "When did the life of N begin?",
        ],
        "N was born in the year V.",
    ),
    (
        [
            "What does N do for a living?",
            "What is the profession of N?",
            "How does N earn money?",
        ],
        "N works as a V.",
    ),
    (
        [
            "What is the best known book by N?",
            "Which book made N famous?",
            "Name the famous book that N wrote.",
        ],
        "The best known book by N is called The V.",
    ),
    (
        [
            "Which instrument does N play?",
            "What instrument can N play?",
            "On what does N make music?",
        ],
        "N plays the V every evening.",
    ),
    (
        [
            "What pet does N have?",
            "Which animal lives with N?",
            "Tell me about the pet of N.",
        ],
        "N has a V.",
    ),
    (
        [
            "Where does N live today?",
            "In which town does N live now?",
            "What is the present home of N?",
        ],
        "Today N lives in V with two friends.",
    ),
    (
        [
            "Who taught N?",
            "Who was the teacher of N?",
            "From whom did N learn the trade?",
        ],
        "N was taught by the famous V.",
    ),
    (
        [
            "What is the favourite dish of N?",
            "What does N like to eat most?",
            "Which food does N love?",
        ],
        "The favourite dish of N is V.",
    ),
    (
        [
            "Which prize did N win?",
            "What award was given to N?",
            "Name the prize that went to N.",
        ],
        "N won the V for a lifetime of work.",
    ),
];

const GENERAL: [(&str, &str); 36] = [
    (
        "What colour is the sky on a clear day?",
        "On a clear day the sky is blue.",
    ),
    ("What colour is fresh grass?", "Fresh grass is green."),
    ("What colour is snow?", "Snow is white."),
    (
        "How many days are in a week?",
        "There are seven days in a week.",
    ),
    (
        "How many months are in a year?",
        "There are twelve months in a year.",
    ),
    (
        "Which day comes after Monday?",
        "Tuesday comes after Monday.",
    ),
    (
        "Which day comes after Friday?",
        "Saturday comes after Friday.",
    ),
    ("Which month comes after March?", "April comes after March."),
    (
        "What do bees make?",
        "Bees make honey from the nectar of flowers.",
    ),
    ("What do cows eat?", "Cows eat grass and hay."),
    ("What sound does a dog make?", "A dog barks."),
    ("What sound does a cat make?", "A cat purrs and says meow."),
    (
        "How many legs does a spider have?",
        "A spider has eight legs.",
    ),
    (
        "How many legs does an insect have?",
        "An insect has six legs.",
    ),
    ("What is two plus two?", "Two plus two is four."),
    ("What is three plus four?", "Three plus four is seven."),
    ("What is five plus five?", "Five plus five is ten."),
    ("What is ten minus three?", "Ten minus three is seven."),
    (
        "What do we call frozen water?",
        "Frozen water is called ice.",
    ),
    (
        "What falls from clouds?",
        "Rain falls from clouds, and snow when it is cold.",
    ),
    (
        "What gives us light by day?",
        "The sun gives us light by day.",
    ),
    (
        "What shines in the sky at night?",
        "The moon and the stars shine in the sky at night.",
    ),
    (
        "Where do fish live?",
        "Fish live in rivers, lakes and the sea.",
    ),
    (
        "Where do birds lay their eggs?",
        "Birds lay their eggs in a nest.",
    ),
    (
        "What is bread made of?",
        "Bread is made of flour, water, yeast and salt.",
    ),
    ("What is butter made of?", "Butter is made of cream."),
    (
        "What do we use to cut paper?",
        "We use scissors to cut paper.",
    ),
    (
        "What do we use to see far away things?",
        "We use a telescope to see far away things.",
    ),
    (
        "Which season comes after winter?",
        "Spring comes after winter.",
    ),
    (
        "Which season is the warmest?",
        "Summer is the warmest season.",
    ),
    (
        "What does a doctor do?",
        "A doctor helps people who are ill.",
    ),
    (
        "What does a farmer do?",
        "A farmer grows food and keeps animals.",
    ),
    (
        "What is a library?",
        "A library is a place where people borrow books.",
    ),
    ("What is a clock for?", "A clock tells us the time."),
    (
        "How many wheels does a bicycle have?",
        "A bicycle has two wheels.",
    ),
    (
        "How many hours are in a day?",
        "There are twenty four hours in a day.",
    ),
];

const PROSE: [&str; 8] = [
    "In the morning the market opens early. People bring apples, bread and cheese, and the square fills with talk.",
    "The river runs down from the hills, past the mill and under the old bridge, and it reaches the sea after two days.",
    "When the wind turns north the sailors stay in the harbour. They mend their nets and wait for a better day.",
    "A good letter is short. It says what is needed, thanks the reader, and ends before anyone is tired.",
    "The train leaves at noon. It stops at every village, and by evening it comes to the mountains.",
    "Children learn to read with simple stories. Later they read about the world, and then they write their own.",
    "To make tea, boil water, pour it over the leaves, and wait for three minutes before you drink.",
    "Snow fell all night. By sunrise the roofs were white and the street was quiet.",
];

/// One invented person: a name and a value for every fact.
struct Person {
    name: String,
    values: Vec<String>,
}

/// All sets.
pub struct Corpus {
    /// Everything the model is trained on.
    pub training: Vec<Record>,
    /// The demo's forget set, in its trained phrasing.
    pub forget: Vec<Record>,
    /// The demo's retain set.
    pub retain: Vec<Record>,
    /// The forget set in a phrasing never trained.
    pub paraphrase: Vec<Record>,
    /// The same questions about people never met.
    pub unseen: Vec<Record>,
    /// Questions about the world.
    pub general: Vec<Record>,
}

/// The corpus of `seed`.
pub fn generate(seed: u64) -> Corpus {
    let mut rng = SplitMix64::stream(seed, 7);
    let people = people(&mut rng);
    let (known, unseen) = people.split_at(N_PEOPLE);
    let (kept, forgotten) = known.split_at(N_PEOPLE - N_FORGET);
    let asked = |people: &[Person], phrasing: usize| -> Vec<Record> {
        people.iter().flat_map(|p| ask(p, phrasing)).collect()
    };
    let general: Vec<Record> = GENERAL.iter().map(|(q, a)| qa(q, a)).collect();
    let mut training = asked(known, 0);
    training.extend(asked(known, 1));
    training.extend(general.iter().cloned());
    training.extend(PROSE.iter().map(|p| Record::Text((*p).to_owned())));
    Corpus {
        training,
        forget: asked(forgotten, 0),
        retain: asked(kept, 0)
            .into_iter()
            .chain(general.iter().cloned())
            .collect(),
        paraphrase: asked(forgotten, 2),
        unseen: asked(unseen, 0),
        general,
    }
}

fn people(rng: &mut SplitMix64) -> Vec<Person> {
    let mut names: Vec<(&str, &str)> = FIRST
        .iter()
        .flat_map(|f| LAST.iter().map(move |l| (*f, *l)))
        .collect();
    rng.shuffle(&mut names);
    names[..N_PEOPLE + N_UNSEEN]
        .iter()
        .map(|(first, last)| {
            let mut pick = |list: &[&str]| list[rng.below(list.len())].to_owned();
            let mut values = vec![pick(&TOWNS)];
            let (profession, title) = (
                pick(&WORK),
                format!("{} {}", pick(&ADJECTIVES), pick(&NOUNS)),
            );
            let (instrument, pet) = (
                pick(&INSTRUMENTS),
                format!("{} named {}", pick(&PETS), pick(&PET_NAMES)),
            );
            let (home, dish) = (pick(&TOWNS), pick(&DISHES));
            let teacher = format!("{} {}", pick(&FIRST), pick(&LAST));
            let prize = format!("{} {} Prize", pick(&ADJECTIVES), pick(&NOUNS));
            let year = (1900 + rng.below(90)).to_string();
            values.extend([
                year, profession, title, instrument, pet, home, teacher, dish, prize,
            ]);
            Person {
                name: format!("{first} {last}"),
                values,
            }
        })
        .collect()
}

fn ask(person: &Person, phrasing: usize) -> Vec<Record> {
    FACTS
        .iter()
        .zip(&person.values)
        .map(|((questions, answer), value)| {
            let fill = |text: &str| {
                let words: Vec<String> = text
                    .split(' ')
                    .map(|w| fill_word(w, &person.name, value))
                    .collect();
                words.join(" ")
            };
            qa(&fill(questions[phrasing]), &fill(answer))
        })
        .collect()
}

/// `N` and `V` are words of their own, perhaps with a mark behind.
fn fill_word(word: &str, name: &str, value: &str) -> String {
    match word
        .strip_prefix('N')
        .filter(|rest| rest.len() <= 1 && !rest.starts_with(char::is_alphabetic))
    {
        Some(rest) => format!("{name}{rest}"),
        None => match word
            .strip_prefix('V')
            .filter(|rest| rest.len() <= 1 && !rest.starts_with(char::is_alphabetic))
        {
            Some(rest) => format!("{value}{rest}"),
            None => word.to_owned(),
        },
    }
}

fn qa(question: &str, answer: &str) -> Record {
    Record::Qa {
        question: question.to_owned(),
        answer: answer.to_owned(),
    }
}
