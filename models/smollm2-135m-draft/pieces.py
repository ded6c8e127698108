"""The words that prompts.py composes prompts of. Names in braces are slots; see `Slots` there."""

SYLLABLES = "ar bel cor da el fen gra hol is jor kel lu mar nor os pel quin ra sol tam ur vel wyn zan mi tho".split()
PEOPLE_FIRST = ("Amina Ben Carla Dmitri Elena Farid Grace Hugo Ines Jonas Keiko Liam Mara Nadia Oscar Priya Quentin Rosa Samuel "
                "Tessa Umar Vera Walter Xenia Yusuf Zoe Anders Beatrice Cedric Dalia Emil Fatima Georg Hannah Ivan Julia").split()
PEOPLE_LAST = ("Abbott Bergmann Castillo Dubois Eriksen Fischer Galloway Haddad Ivers Jansen Kowalski Lindqvist Moreau Nakamura "
               "Okafor Petrov Quigley Rossi Sandoval Thornton Underhill Vargas Whitaker Yilmaz Zhang Okoye Mbeki Novak Larsen Brandt").split()
PLACES = ("Lisbon Oslo Nairobi Kyoto Dublin Cracow Lima Hanoi Seville Bergen Ghent Trieste Halifax Tucson Adelaide Wellington Tallinn "
          "Zagreb Montreal Valencia Porto Leeds Bremen Lyon Turin Geneva Austin Denver Cardiff Perth Accra Tunis Quito Riga").split()
WORDS = ("apple river cloud stone green level radar window orange planet kitten summer Noon Garden bridge yellow music paper "
         "Rocket silver coffee dragon happy winter basket turtle civic Market tiger lemon").split()
LISTS = {
    "animal": "otter,heron,badger,beaver,squirrel,honeybee,barn owl,sea turtle,raven,toad,dolphin,hedgehog,elephant,bat,crow,penguin".split(","),
    "food": "lentil soup,sourdough bread,mushroom risotto,fish tacos,apple pie,vegetable curry,potato salad,pancakes,ramen,paella".split(","),
    "gadget": "electric kettle,smart watch,robot vacuum,noise-cancelling headset,folding bicycle,e-reader,camping stove,desk lamp,phone,"
              "air fryer,standing desk,laptop,running shoe,garden hose,coffee grinder,backpack".split(","),
    "hobby": "gardening,chess,bird watching,pottery,rock climbing,baking,photography,knitting,sailing,cycling,painting,hiking,astronomy".split(","),
    "job": "nurse,carpenter,lighthouse keeper,train driver,teacher,pilot,baker,detective,farmer,librarian,marine biologist,judge,tailor,"
           "software engineer,firefighter,museum guide,doctor,chef,beekeeper,journalist,travel agent,personal trainer".split(","),
    "room": "kitchen,station,library,school,harbour,market,old tower,bakery,bus stop".split(","),
    "place": "a small fishing village,a night train,a flooded city,a mountain hut,an abandoned observatory,a busy airport,an island without "
             "roads,a desert town,a greenhouse on Mars,a library that never closes,a castle kitchen,an underground lake".split(","),
    "object": "a rusty key,a letter without a sender,a broken clock,a blue umbrella,a map with a hole,a silver coin,an old radio,a jar of "
              "sand,a violin,a photograph of strangers,a paper boat,a locked box".split(","),
    "mood": "hopeful,tense,funny,melancholic,mysterious,calm,dramatic,warm,dry,playful".split(","),
    "cause": "longer library hours,a four-day work week,free public transport,school gardens,later school starts,less food waste,a car-free "
             "city centre,teaching music to every child,repairing instead of buying,planting trees along streets,shorter meetings,"
             "a tax on sugar,remote work,uniforms at school,zoos,keeping cash".split(","),
    "event": "a charity run,a wedding,a product launch,a school play,a power cut,a family reunion,a job interview,a job fair,a power outage,"
             "a book club meeting,a street festival,a science fair,a farewell party,a team retreat".split(","),
    "company": "a small bakery,a bike repair shop,a seed start-up,a language school,a board game publisher,a veterinary clinic,a solar "
               "installer,a second-hand book shop,a moving company,a yoga studio".split(","),
    "person": "your landlord,a new colleague,your former teacher,a customer who waited too long,the city council,a friend who moved abroad,"
              "your manager,a hotel,the editor of a newspaper,your neighbours,a professor,an airline".split(","),
    "figure": "a medieval monk,an astronaut on her first walk,a pirate captain,a talking lighthouse,a robot butler,a grumpy wizard,a Roman "
              "soldier,an old oak,a stock broker of the 1920s,a deep-sea diver,a raindrop,a retired spy,a Victorian inventor,a house cat,"
              "a sports commentator,a time traveller,a dragon who is afraid of fire,a chess piece,a city pigeon,a ship's cook".split(","),
    "question": "What did you have for breakfast?,What makes a good friend?,How do you deal with fear?,What is your opinion of modern "
                "phones?,What was the best day of your life?,How should I spend a free afternoon?,Why do people travel?,What would you "
                "change about the world?,How do you learn something new?,What do you think of winter?,Can money make us happy?".split(","),
    "skill": "how to bake bread,how a computer stores a picture,how to save money,how vaccines work,how to change a tyre,what a loan is,how "
             "to train a dog,how to read a map,what inflation is,how to sleep better,how to write a clear email,what a budget is".split(","),
    "lang": "Python,Python,Python,JavaScript,Java,C++,Go,Rust,SQL,Bash".split(","),
    "money": "$3.2 million,$480,000,$12 million,$75,000,£2.4 million,£610,000,€1.8 million,€95,000,€40 million,$220 million".split(","),
    "trait": "patience,honesty,curiosity,courage,good timing,teamwork,careful planning,humour".split(","),
    "colour": "red,blue,green,white,black,yellow,grey,purple".split(","),
    "country": "Norway,Kenya,Peru,Japan,Portugal,Canada,Vietnam,Egypt,Chile,Poland,Greece,India,Mexico,Finland,Morocco,Brazil,Turkey,Ireland,"
               "Thailand,Argentina,Hungary,Indonesia,Nigeria,Iceland,Austria,Cuba,Mongolia,Nepal,Ethiopia,New Zealand,Bolivia,Romania,Jordan,"
               "Denmark,South Korea,Switzerland,Belgium,Ukraine,Australia,Colombia,Sri Lanka,Tanzania,Croatia,Algeria,Uruguay".split(","),
    "element": "helium,carbon,iron,gold,sodium,oxygen,copper,neon,uranium,silver,mercury,lead,calcium,tin,chlorine,potassium,nickel,zinc".split(","),
    "book": "Moby-Dick,Jane Eyre,The Odyssey,Don Quixote,Frankenstein,Dracula,War and Peace,Emma,The Trial,Beloved,Hamlet,Faust,Ulysses,"
            "Middlemarch,The Hobbit,Brave New World,The Great Gatsby,Little Women,Dune,The Stranger,Great Expectations,Candide".split(","),
    "film": "Casablanca,Jaws,Alien,Titanic,Psycho,Vertigo,Gladiator,Rocky,Grease,Chinatown,The Matrix,Inception,Forrest Gump,Toy Story,"
            "The Godfather,Fargo,Amadeus,Ghostbusters,Top Gun,Home Alone,Pulp Fiction,Blade Runner,Die Hard".split(","),
    "song": "Imagine,Purple Rain,Hotel California,Thriller,Hallelujah,Waterloo,Respect,Jolene,Billie Jean,Hey Jude,Wonderwall,Africa,"
            "Dancing Queen,Like a Prayer,Rolling in the Deep,Born to Run,Sweet Caroline,Bohemian Rhapsody".split(","),
    "invention": "the telephone,the printing press,the steam engine,the light bulb,the zipper,the microwave oven,dynamite,the bicycle,the "
                 "World Wide Web,the barometer,penicillin,the ballpoint pen,the elevator brake,the sewing machine,the thermometer".split(","),
    "landmark": "the Eiffel Tower,the Colosseum,the Taj Mahal,Machu Picchu,the Statue of Liberty,Big Ben,the Alhambra,Petra,Angkor Wat,"
                "the Golden Gate Bridge,the Brandenburg Gate,Mount Fuji,the Blue Mosque,the Sydney Opera House,Niagara Falls".split(","),
    "river": "the Nile,the Danube,the Amazon,the Rhine,the Mekong,the Volga,the Seine,the Ganges,the Mississippi,the Thames,the Congo".split(","),
    "sport": "basketball,rugby,tennis,ice hockey,baseball,volleyball,cricket,water polo,badminton,golf,curling,fencing".split(","),
    "organ": "the liver,the kidneys,the pancreas,the heart,the spleen,the lungs,the inner ear,the retina,the skin,the small intestine".split(","),
    "war": "the Crimean War,the First World War,the American Civil War,the Thirty Years' War,the Vietnam War,the Korean War,the Boer War,"
           "the Hundred Years' War,the Spanish Civil War".split(","),
    "number": "seven,nine,twelve,fifteen,twenty,thirty,forty,fifty".split(","),
}

LIMITS = ["Use fewer than 150 words.", "Keep it to three paragraphs.", "Answer in fewer than {0} sentences.".format("eight"), "Give it a title.",
          "Write in the first person.", "Use a friendly tone.", "Avoid jargon.", "End with a question to the reader.", "Use bullet points.",
          "Write it as a dialogue.", "Make it suitable for children.", "Begin with a surprising sentence."]
WRITING = [
    "Write a blog post about {hobby} in {L} for people who have never tried it.",
    "Write a blog post that compares two kinds of {gadget} and says who should buy which.",
    "Draft the outline of an article on {cause}, with headings and key points.",
    "Write an email to {person} about {event} that did not go as planned.",
    "Write a polite email to {person} asking for {N} more days.",
    "Write a short story set in {place} in which somebody finds {object}.",
    "Write the first chapter of a {mood} novel that begins with {object} and ends in {place}.",
    "Write a {mood} poem about {animal}s in the month of snow.", "Compose a {mood} letter from a {job} to a {job2}.",
    "Write a review of a restaurant in {L} that is famous for its {food}.", "Write a review of a {gadget} that broke after {N} weeks.",
    "Write a persuasive speech for {cause}.", "Argue against {cause} in a letter to a newspaper in {L}.",
    "Write an advertisement for {company} in {L} that offers a discount of {H} percent.",
    "Describe a morning in the life of a {job} in {L}.", "Write an invitation to {event} on {D} in {L}.",
    "Write a recipe for {food} that serves {N} people.", "Write a news report about {event} in {L} that was stopped by a {animal}.",
    "Write a product description of a {colour} {gadget} made by {company}.", "Write a cover letter for a job as a {job} at {company}.",
    "Write a thank-you note to {person} after {event}.", "Plan a weekend in {L} for a family that loves {hobby}.",
    "Write a fable about {animal} and {animal2} that teaches {trait}.", "Write a diary entry of somebody who lives in {place}.",
    "Write a conversation between a {job} and a {animal} about {cause}.", "Rewrite this in a formal tone: hey, can't make it to {event} on {D}, "
    "the {gadget} is broken again and I'm stuck in {L}, sorry!",
    "Correct the grammar of this text: Yesterday me and {P} goes to {L} for {event}, we was very happy but the {food} were cold and nobody "
    "don't told us.", "Write {N} headlines for an article about {cause} in {L}.", "Write a toast for {P}, a {job} who retires after {H} years.",
]
ROLEPLAY = [
    "Pretend to be {figure} and answer this: {question}", "You are {figure}. A child from {L} asks you: \"{question}\" What do you say?",
    "Imagine that you are {figure} who has just arrived in {L}. Describe what you see and what you think of it.",
    "Act as a {job} in {L}. I am a new customer and I want to know {skill}.",
    "You are a {job}. Explain to your apprentice {skill}, with an example from your work.",
    "Speak like {figure} and tell me {skill}.", "Play the part of {figure} in an interview. First question: {question}",
    "Take the role of a {job} who has to calm a crowd at {event}. What do you say?",
    "Suppose you are {figure} and meet {figure2} in {place}. Write what you say to each other.",
    "As {figure}, write a postcard from {place} to {P}.", "You are the mayor of {L} and want to introduce {cause}. Answer a sceptical {job}.",
    "Be my interviewer: I apply for a position as a {job} at {company}. Ask me {N} questions, one for each skill that matters.",
    "You are {object} in {place}. Tell the story of your life.", "Stay in the character of {figure} and complain about {event}.",
]
SYLLOGISMS = [
    "All {X1}s are {colour}. Some {animal}s are {X1}s. Does it follow that some {animal}s are {colour}?",
    "No {job} in {L} likes {food}. {P} likes {food} and lives in {L}. Can {P} be a {job}?",
    "If it rains, {P} takes the train. {P} did not take the train today. Did it rain? Explain.",
    "Every {X1} has a {X2}, and no {X2} has a {colour} door. Is there a {X1} with a {colour} door that belongs to its {X2}?",
    "Only people who like {hobby} may enter the {room}. {P} entered the {room}. What do we know about {P}?",
    "{P} says that {P2} lies. {P2} says that {P3} lies. {P3} says that both others lie. Who tells the truth?",
]
PUZZLES = SYLLOGISMS + [
    "{P} has {N} brothers, and each of them has one sister. How many children are in the family? Explain step by step.",
    "A train leaves {L} at {N} o'clock and needs {H} minutes to {L2}. Another starts {N2} minutes later and is twice as fast. Which arrives first?",
    "There are {H} books on a shelf. {P} takes every third one, and {P2} takes half of what is left. How many remain?",
    "A box holds {N} {colour} and {N2} {colour2} balls. What is the chance of drawing a {colour} one, and then another?",
    "If {N} machines make {N} parts in {N} minutes, how long do {H} machines need for {H} parts?",
    "The day before yesterday was a {day}. What day will it be in {H} days?", "What is {H} times {N}, minus {H2}? Show the steps.",
    "The father of {P} is the only son of {P2}. How are {P} and {P2} related?", "Solve for x: {N}x + {H} = {H2}.",
    "A rectangle is {N} cm wide and {H} cm long. What are its area and its perimeter?",
    "A shop in {L} sells a {gadget} for {H} dollars. It is first made {N} percent dearer and then {N} percent cheaper. What does it cost now?",
    "You see a {colour} door and a {colour2} door. A sign on the {colour} one says: only one of the two signs is true. The other says: the "
    "treasure is here. Where is the treasure?",
    "{P} parks facing {wind}, turns left twice and right once. Which way does the car point now?",
    "Which is the odd one out, and why: {animal}, {animal2}, {gadget}, {animal3}?", "What do a {job} and a {animal} have in common? Name three things.",
    "{P} is {H} years old; {P2} is {N} years younger and twice as old as {P3}. How old is {P3}?", "Given f(x) = {N}x^2 - {N2}x + {H}, find f({N3}).",
]
LISTS["day"] = "Monday,Tuesday,Wednesday,Thursday,Friday,Saturday,Sunday".split(",")
LISTS["wind"] = "north,south,east,west".split(",")

EXPLAIN = [
    "Explain {topic}{reader}.", "What is {topic} and why does it matter{reader}?", "Give an overview of {topic} with two examples{reader}.",
    "Describe the main ideas behind {topic}{reader}.", "Discuss the strengths and weaknesses of {topic}.", "How did {topic} change everyday life?",
    "Write a short lecture on {topic}{reader}.", "List five facts about {topic} and explain the most important one.",
    "What are common misunderstandings about {topic}?", "What should a beginner read or try first to learn about {topic}?",
    "Summarise the history of {topic} in a few paragraphs.", "Answer like a textbook: how does {topic} work or come about?",
    "Propose a class of one hour on {topic} for {H} students.", "Ask three good questions about {topic} and answer them.",
]
READERS = ["", "", "", "", " to a ten-year-old", " to somebody who has never heard of it", " for a student before an exam", " in simple words",
           " in under 200 words", " with an example from daily life", " step by step"]
HUMANITIES = """the Silk Road|the French Revolution|the fall of Rome|Stoic philosophy|the printing of the first newspapers|Greek tragedy|the Industrial
Revolution|the Renaissance in Florence|the Ottoman Empire|supply and demand|inflation|the separation of powers|utilitarianism|the Cold War|
the Harlem Renaissance|Impressionist painting|jazz|the haiku|the novel as a form|the Magna Carta|women's suffrage|the Black Death|colonial trade|
the Great Depression|democracy in Athens|existentialism|business customs in Korea|antique sculpture|the Bauhaus|folk tales|the origin of writing|
the gold standard|central banks|monopolies|free trade|comparative advantage|the United Nations|propaganda|the Enlightenment|feudalism|nomadic
cultures|the abolition of slavery|oral history|the ethics of care|game theory in politics|the welfare state|Gothic cathedrals|opera|sign languages|
the Maya calendar|public libraries|taxation|the Meiji Restoration|Aztec society|Viking voyages|the partition of India|the social contract|urban
planning|etiquette at dinner in France|dialects|bilingual education|stage design|photojournalism""".split("|")
STEM = """photosynthesis|plate tectonics|the water cycle|Newton's third law|electric circuits|binary search|hash tables|DNA replication|vaccines|black
holes|the greenhouse effect|prime numbers|the Pythagorean theorem|probability|entropy|acids and bases|the periodic table|magnetism|radioactive decay|
semiconductors|neural networks|evolution by natural selection|the human immune system|batteries|nuclear fusion|the Doppler effect|tides|eclipses|
the scientific method|cell division|enzymes|the carbon cycle|sound waves|lasers|refraction|the speed of light|relativity|quantum tunnelling|operating
systems|databases|encryption|recursion|the binary system|statistics of small samples|correlation and causation|bridges and their forces|jet engines|
fermentation|antibiotics|blood circulation|the nervous system|soil|earthquakes|volcanoes|glaciers|orbits of satellites|combustion|surface tension|
osmosis|heat pumps|wind turbines|internet routing|sorting algorithms|logarithms|matrices|limits in calculus|chemical equilibrium|polymers""".split("|")

HUMANITIES, STEM = ([" ".join(t.split()) for t in topics] for topics in (HUMANITIES, STEM))

EXTRACT = [
    "List all names of people in the text below as a JSON array.", "Find every year that the text mentions.", "Extract all numbers with what they count.",
    "Name the people, the places and the organizations. Answer as a JSON object with the keys people, places and organizations.",
    "Which dates are in this text? One per line, nothing else.", "Make a table with the columns who, what, when and where.",
    "Extract the amounts of money and what they were for.", "Return JSON with the keys \"subject\", \"founded\", \"person\" and \"place\"; use null where nothing is said.",
    "Write the three main facts as a numbered list of short phrases.", "Pick out every place name, in the order of the text, separated by commas.",
    "Which sentence is an opinion and not a fact? Quote it.", "Count how many different people are named, and name them.",
    "Classify each sentence as about money, people, time or something else.", "Give the keywords of this text, at most {N}, in lower case.",
]
RECORDS = [
    "{P} from {L} bought a {colour} {gadget} on {D} for {H} dollars.", "Order {M}: {N} boxes of {food}, to be delivered to {P}, {L}, by {D}.",
    "Dr. {P} ({job}, {L}) speaks about {hobby} on {D} at {N} o'clock.", "The flight from {L} to {L2} on {D} was {H} minutes late.",
    "{P} rated the {gadget} with {N} of 20 points: works well, but too heavy.", "Contract between {company} and {P}, signed in {L} on {D} {YY}, worth {money}.",
    "In {YY}, {M} visitors saw the {animal}s in {L}.", "Ticket {M}: {P} reports that the {gadget} does not start since {D}.",
]
SUMMARIZE = ["Summarize:", "Summarize:", "Summarise the following text:", "Summarize this article in three sentences:", "TL;DR of the text above?",
             "Write a summary of the text above in one paragraph.", "What are the main points of this text?", "Give me the essence of the text in fewer than 60 words.",
             "Write a headline and a two-sentence summary for this:", "Condense this for a newsletter:", "Summarise it in plain words for a busy reader."]
ANSWER_FROM = ["Answer the question using only the text.", "Use the passages to answer.", "Read the text and answer briefly.",
               "Based on what is written above or below, answer this.", "If the text does not say, answer that it does not.", "Quote the sentence that answers the question."]

QUESTIONS = [
    "What is the capital of {country}?", "Which languages are spoken in {country}?", "What is the currency of {country}?", "What is {country} known for?",
    "Which countries border {country}?", "How many people live in {country}?", "What is the highest mountain of {country}?", "When is the national day of {country}?",
    "Who wrote {book}?", "When was {book} published?", "Who is the main character of {book}?", "Where does the story of {book} take place?",
    "Who played the lead in {film}?", "Who directed {film}?", "In which year did {film} come out?", "Where was {film} shot?", "Who wrote the music for {film}?",
    "Who sang {song}?", "When was the song {song} released?", "What is the meaning of the song {song}?", "Who invented {invention}?",
    "When was {invention} invented?", "Where is {landmark}?", "Who built {landmark}?", "How old is {landmark}?", "Where does {river} begin?",
    "Which cities lie on {river}?", "Into which sea does {river} flow?", "How many players are on a {sport} team?", "Where did {sport} come from?",
    "How long does a game of {sport} last?", "What is the chemical symbol of {element}?", "What is {element} used for?", "Who discovered {element}?",
    "What is the melting point of {element}?", "What does {organ} do?", "Where in the body is {organ}?", "When did {war} begin?", "Who won {war}?",
    "What do {animal}s eat?", "How long do {animal}s live?", "Where do {animal}s sleep?", "What is a young {animal} called?",
    "How is {food} made?", "Where does {food} come from?", "What does a {job} earn in {country}?", "How do you become a {job}?",
]

# A subject: a first sentence, then others in any order, each with the question that it answers ("" for none).
PASSAGES = {
    "bridge": [
        ("The {X} Bridge crosses the river at {L} and has carried traffic since {Y}.", "Since when has the {X} Bridge carried traffic?"),
        ("It was designed by the engineer {P}, who had studied in {L2} and had never built anything larger than a railway shed.", "Who designed the {X} Bridge?"),
        ("The main span measures {M} feet, which made it the longest of its kind in the region.", "How long is the main span of the bridge?"),
        ("Construction cost {money}, about twice what the council had set aside.", "How much did the construction cost?"),
        ("During the second winter {N} workers were injured when a crane slipped on the ice.", "How many workers were injured?"),
        ("The towers were painted {colour} at first, and people called them the {colour} giants.", "What colour were the towers at first?"),
        ("In {YY} the deck was closed for repairs after a diver found cracks below the waterline.", "Why was the deck closed in {YY}?"),
        ("Today about {M2} cars use it on a working day, and a lane for bicycles was added on the southern side.", "How many cars use the bridge on a working day?"),
        ("{P2}, who wrote a history of the town, calls it the only building that every family has a story about.", "What does {P2} say about the bridge?"),
        ("A toll was collected until the debt was paid, and the small toll house is now a café.", "What is the toll house used for today?"),
    ],
    "company": [
        ("{X} Works was founded in {L} in {YY} by {P} and {P2}, who had met at a course on {hobby}.", "Who founded {X} Works?"),
        ("Its first product was a {gadget} that could be taken apart with a single tool.", "What was the first product of {X} Works?"),
        ("In the first year the company sold {M} pieces, most of them at weekend markets.", "How many pieces were sold in the first year?"),
        ("An investor from {L2} offered {money} for half of the shares, and the founders refused.", "What did the investor offer?"),
        ("After a fire in the store room on {D} production stood still for {N} weeks.", "How long did production stand still after the fire?"),
        ("The firm now has {H} employees, of whom a third work on repairs.", "How many employees does the firm have?"),
        ("{S} left the board in order to become a {job}, but still visits the workshop every month.", "What did {S} become after leaving the board?"),
        ("Critics say that the prices are too high, while customers praise the guarantee of {N2} years.", "How long is the guarantee?"),
        ("Last autumn a second workshop was opened in {L3}, where the {colour} line of products is made.", "Where was the second workshop opened?"),
        ("The company gives {N} percent of its profit to a school for the trades.", "What happens with part of the profit?"),
        ("Its advertising is unusual: it shows only products that have been used for ten years or longer.", "What is unusual about the advertising?"),
    ],
    "animal": [
        ("The {X} {animal} was first described by {P} after a journey to the hills near {L} in {Y}.", "Who first described the {X} {animal}?"),
        ("An adult weighs about {N} kilograms and can be told from its relatives by a {colour} mark on the throat.", "How can the {X} {animal} be told from its relatives?"),
        ("It is active at dusk and spends the day in hollows that other animals have left.", "When is the animal active?"),
        ("Females raise {N2} young a year, and both parents bring food.", "How many young are raised in a year?"),
        ("A count in {YY} found only {M} animals, fewer than half of what had been expected.", "How many animals did the count find?"),
        ("The main threat is not hunting but the draining of small ponds.", "What is the main threat to the animal?"),
        ("{P2} of the wildlife trust in {L2} has fitted {H} of them with tiny transmitters.", "Who fitted animals with transmitters?"),
        ("The signals showed that some walk more than {H2} kilometres in a month, always along the same paths.", "What did the signals show?"),
        ("Farmers were sceptical at first, but they are now paid for every hedge that they keep.", "What are farmers paid for?"),
        ("Its call, a long whistle followed by a click, gave it its local name.", "What gave the animal its local name?"),
    ],
    "election": [
        ("Voters in {L} elected {P} as their new mayor on {D}, with {H} percent of the vote.", "Who was elected mayor of {L}?"),
        ("The former {job} defeated {P2}, who had held the office since {YY}.", "Who had held the office before?"),
        ("The campaign was dominated by the question of {cause}.", "Which question dominated the campaign?"),
        ("Turnout was the highest in {N} years, and some stations ran out of ballots before noon.", "How high was the turnout?"),
        ("In a speech at the {room} {S} promised to publish every contract above {money}.", "What did {S} promise?"),
        ("The defeated side asked for a recount in {N2} districts, which the court rejected on the same evening.", "What did the court reject?"),
        ("A local paper reported that {M} letters with complaints had been received.", "How many letters of complaint were received?"),
        ("{P3}, who teaches politics in {L2}, said that the result was less a victory than a warning.", "What did {P3} say about the result?"),
        ("The new council will meet for the first time in the second week of the coming month.", "When will the new council meet?"),
        ("One of the first decisions will concern the old harbour, which has been empty for years.", "What will one of the first decisions concern?"),
    ],
    "sport": [
        ("{X} United beat {L} by {N} goals to one on {D} and moved up to second place.", "Which place did {X} United move up to?"),
        ("{P} scored twice before the break, although a shoulder injury had kept the striker out for {N2} weeks.", "Who scored twice before the break?"),
        ("Coach {P2} praised the defence and said that the team had finally learned to be patient.", "What did coach {S2} say?"),
        ("A crowd of {M} watched in heavy rain, and the start was delayed by {H} minutes.", "By how long was the start delayed?"),
        ("The visitors played the last half hour with ten men after {P3} was sent off for a late tackle.", "Why did the visitors play with ten men?"),
        ("The club paid {money} for its goalkeeper in the summer, a record in its history.", "What did the club pay for its goalkeeper?"),
        ("It was the first win in {L} since {YY}, when the old stadium was still standing.", "When was the last win in {L} before that?"),
        ("Supporters plan a protest against the new ticket prices before the next home game.", "What do supporters plan?"),
        ("The referee had to consult the video three times, which annoyed both benches.", "How often did the referee consult the video?"),
        ("Next week the team travels to {L2}, where it has lost every match of the past {N3} seasons.", "Where does the team travel next week?"),
    ],
    "discovery": [
        ("Researchers from {L} have found a material that {X}, their computer model, had predicted {N} years ago.", "What had been predicted years ago?"),
        ("The team of {P} mixed {element} with a common salt and cooled it slowly under pressure.", "What did the team mix?"),
        ("The result conducts heat {H} times better than glass and does not break when it is bent.", "How well does the material conduct heat?"),
        ("The first sample was smaller than a grain of rice, and it was lost on the floor for a day.", "What happened to the first sample?"),
        ("{P2} of the institute in {L2}, who was not part of the study, asked for tests over a longer time.", "Who asked for longer tests?"),
        ("The work was paid for with {money} from a public fund.", "How was the work paid for?"),
        ("The authors repeated the measurement {M} times before they believed it.", "How often was the measurement repeated?"),
        ("Possible uses are phones that stay cool, better ovens and lighter engines.", "What are possible uses of the material?"),
        ("The method is described in a paper that anyone can read without paying.", "Where is the method described?"),
        ("A company has already applied for a licence, but {S} wants to keep the recipe open.", "What does {S} want?"),
        ("It will take until at least {N2} years from now before a product is in shops.", "How long will it take until a product is in shops?"),
    ],
    "series": [
        ("\"{X}\" is a television series in {N} parts about a {job} who moves to {place}.", "What is \"{X}\" about?"),
        ("The main role is played by {P}, and {P2} appears as the jealous neighbour.", "Who plays the main role in \"{X}\"?"),
        ("It was written by {P3}, who had worked as a {job2} before.", "Who wrote the series?"),
        ("Most scenes were shot in {L}, because the streets of {L2} had become too modern.", "Where were most scenes shot?"),
        ("The first episode was shown on {D} {YY} and was seen by {M},000 people.", "When was the first episode shown?"),
        ("In the third episode {object} is found in the garden, and nothing is as before.", "What is found in the third episode?"),
        ("The budget of {money} was small, so the same house stands for three different ones.", "How large was the budget?"),
        ("The music was recorded in one night by students of the academy.", "Who recorded the music?"),
        ("Reviewers liked the {mood} tone, but found the ending too sudden.", "What did reviewers dislike?"),
        ("A second season was announced and then cancelled when the studio was sold.", "Why was the second season cancelled?"),
    ],
    "storm": [
        ("A storm with winds of {H} miles an hour passed over {L} on the night of {D}.", "How strong was the wind?"),
        ("About {M} homes were without power, some of them for {N} days.", "How many homes were without power?"),
        ("The roof of the {room} was torn off, and pieces of it were found {N2} kilometres away.", "Which roof was torn off?"),
        ("{P} of the fire service said that nobody was seriously hurt, which she called a small miracle.", "What did {P} call a small miracle?"),
        ("Trains to {L2} stood still until the afternoon because trees lay across the line.", "Why did trains to {L2} stand still?"),
        ("The damage is estimated at {money}, and the insurers have sent extra staff.", "How high is the damage?"),
        ("{P2}, a {job}, took {N3} strangers into her flat after their bus was stopped.", "Whom did {P2} take in?"),
        ("Forecasters had warned of the storm two days before, but expected it further to the north.", "What had forecasters expected?"),
        ("Schools stay closed until Monday so that walls and windows can be checked.", "Until when do schools stay closed?"),
        ("The last storm of this size was in {Y}, when the river changed its course.", "When was the last storm of this size?"),
    ],
    "museum": [
        ("The museum of {X} in {L} shows what people kept in their pockets from {Y} until today.", "What does the museum of {X} show?"),
        ("It began with the collection of {P}, who never threw anything away.", "With whose collection did the museum begin?"),
        ("Among its {M} objects are {object} and a {gadget} that was carried across the Alps.", "How many objects does the museum have?"),
        ("Admission is free on the first {day} of the month.", "When is admission free?"),
        ("The building was once a factory for {food}, and on warm days one can still smell it.", "What was the building once?"),
        ("In {YY} thieves took {N} coins, but left a note with an apology.", "What did thieves take?"),
        ("The director, {P2}, wants every label to be written by a child.", "What does the director want?"),
        ("A new wing for {money} is to open in spring if the city agrees.", "What does the new wing cost?"),
        ("Visitors stay for {H} minutes on average, longer than in the larger museum of {L2}.", "How long do visitors stay on average?"),
        ("School classes may sleep between the cases once a year.", "What may school classes do once a year?"),
    ],
    "person": [
        ("{P} was born in {L} in {Y} as the youngest of {N} children of a {job}.", "Where was {P} born?"),
        ("At the age of {N2} {S} left school to work in a {room}, and learned to read music at night.", "What did {S} do after leaving school?"),
        ("A teacher, {P2}, lent the family a violin that was too large.", "Who lent the family a violin?"),
        ("The first concert in {L2} was a failure: only {H} tickets were sold.", "How many tickets were sold for the first concert?"),
        ("Success came with a piece called \"{X}\", which lasts barely {N3} minutes.", "Which piece brought success?"),
        ("It was played at the opening of the great exhibition in {L3} before {M} people.", "Where was the piece played?"),
        ("In later years {S} spoke against war and gave away most of a fortune of {money}.", "What did {S} do with the fortune?"),
        ("Letters to {P3} show somebody who doubted every note.", "What do the letters to {P3} show?"),
        ("A street, a school and a kind of rose bear the name {S} today.", "What bears the name {S} today?"),
        ("The house of the family burned down, and with it all early works.", "What was lost when the house burned down?"),
    ],
    "island": [
        ("{X} is an island of {H} square kilometres off the coast of {country}.", "How large is {X}?"),
        ("Its {M} inhabitants live from fishing, from visitors and from {food} sold on the mainland.", "What do the inhabitants of {X} live from?"),
        ("Ferries leave from {L} twice a day in summer and on {day}s in winter.", "When do ferries leave in winter?"),
        ("The lighthouse was built in {Y} and is looked after by {P}.", "Who looks after the lighthouse?"),
        ("A rare kind of {animal} breeds on the northern cliffs, where walking is forbidden from March to July.", "Why is walking forbidden on the northern cliffs?"),
        ("Since {YY} all power comes from {N} wind turbines and a battery in the old church.", "Where does the power come from?"),
        ("There is one school with {N2} pupils and a single teacher, {P2}, who also plays the organ.", "Who is the teacher on the island?"),
        ("The highest point, {H2} metres above the sea, can be reached in an hour.", "How high is the highest point?"),
        ("Young people leave for {L2}, and some return when they have children.", "When do young people return?"),
        ("A plan for a hotel worth {money} was voted down by a margin of {N3} votes.", "What happened to the plan for a hotel?"),
    ],
    "health": [
        ("A study of {M} adults in {L} looked at what happens to people who take up {hobby}.", "What did the study look at?"),
        ("Over {N} years the group slept longer and went to the doctor {H} percent less often.", "How much less often did the group go to the doctor?"),
        ("The lead author, {P}, warned that healthy people may simply be more active.", "What did the lead author warn of?"),
        ("Half of the participants were told to change nothing, and they were paid {N2} dollars a week.", "What was half of the participants told?"),
        ("Blood tests were taken on {D} and again a year later.", "When were blood tests taken?"),
        ("No effect was seen in people who already ate {food} every day.", "In whom was no effect seen?"),
        ("The results were strongest among those older than {H2}.", "Among whom were the results strongest?"),
        ("{P2}, a {job} from {L2}, took part and says that the company mattered more than the exercise.", "What does {P2} say?"),
        ("The trial cost {money} and was paid for by a health insurer.", "Who paid for the trial?"),
        ("A larger trial in {N3} countries is to follow.", "What is to follow?"),
    ],
    "city": [
        ("{L} wants to close its centre to cars from {D} on.", "What does {L} want to do?"),
        ("The plan was drawn up by {P}, who did the same in {L2} in {YY}.", "Who drew up the plan?"),
        ("{N} streets become squares with trees, and {M} parking places disappear.", "How many parking places disappear?"),
        ("Shop owners fear for their trade; {P2}, who sells {gadget}s, has collected {H} signatures.", "What do shop owners fear?"),
        ("Residents may still drive in before ten in the morning.", "When may residents still drive in?"),
        ("Buses are to run every {N2} minutes, paid for with {money} from the state.", "How often are buses to run?"),
        ("A trial last summer lowered the noise by half, but some visitors got lost.", "What did the trial last summer show?"),
        ("The opposition calls the plan {mood}, and asks for a vote of the citizens.", "What does the opposition ask for?"),
        ("A {job} at the hospital said that she had heard birds there for the first time.", "What did a {job} at the hospital say?"),
        ("The decision is expected after {N3} hours of debate on {day}.", "When is the decision expected?"),
    ],
    "expedition": [
        ("In {Y} the ship {X} left {L} with {H} men on board to look for a passage in the north.", "Why did the {X} leave {L}?"),
        ("Its captain was {P}, a man who hated the cold.", "Who was the captain of the {X}?"),
        ("They carried food for {N} years, {M} candles and a piano.", "What did they carry?"),
        ("In the second winter the ice closed around the hull and did not open for {N2} months.", "For how long did the ice stay closed?"),
        ("The surgeon, {P2}, kept a diary on the backs of maps.", "Who kept a diary?"),
        ("According to the diary the crew printed a newspaper in order not to lose hope.", "Why did the crew print a newspaper?"),
        ("{N3} men set out on foot and reached a trading post after walking for {H2} days.", "How long did the men on foot walk?"),
        ("The wreck was found in {YY} by a robot that was looking for something else.", "When was the wreck found?"),
        ("The bell of the ship is now in a museum in {L2}.", "Where is the bell of the ship?"),
        ("Historians still argue whether the captain was brave or only stubborn.", "What do historians argue about?"),
    ],
}
GENERAL = [
    ("Not everybody agrees, and the debate is likely to go on.", ""), ("{P8} remembers it well: \"We had no idea what we were doing,\" the {job8} says.", "What does {P8} remember?"),
    ("The details were confirmed by two sources in {L8}.", ""), ("At the time hardly anybody took notice.", ""), ("More will be known by {D8}.", "When will more be known?"),
    ("{P9}, who has written about the matter, speaks of a question of {trait8}.", "What does {P9} speak of?"), ("The reasons are simple, but they were long overlooked.", ""),
    ("A report of {H8} pages lists what went wrong and what went well.", "How long is the report?"), ("It is a story that is told differently by everyone who was there.", ""),
    ("Similar cases are known from {country8} and {country9}.", "From which countries are similar cases known?"), ("In the end it came down to {trait9}.", ""),
    ("For those who live nearby it has become a part of everyday life.", ""), ("A survey found that {H9} percent of those asked approve.", "How many of those asked approve?"),
]

# Of each language: times, subjects, predicates, second clauses, forms, cities.
GRAMMAR = {
    "English": (
        ["Yesterday", "Last week", "In the evening", "On {day}", "Two years ago", "This morning", "In {Y}", "After the meeting", "At noon", "Every winter"],
        ["the mayor", "the old teacher", "our neighbour", "a young doctor", "the company", "the police", "my sister", "the team", "a group of students", "{P}"],
        ["bought {N} new bicycles", "spoke about the plans for the harbour", "forgot the keys in the {room}", "won a prize for a short film", "opened a small shop in {city}",
         "travelled to {city} by train", "asked for more time", "found an old letter", "reported a loss of {M} euros", "closed the road to {city}", "repaired the roof"],
        ["because the weather was bad", "although nobody had expected it", "before the rain began", "so that everyone could come", "while the children were asleep",
         "which surprised many people", "and then went home", "but the work is not finished"],
        ["{t} {s} {p}.", "{t} {s} {p}, {x}.", "{s} {p}.", "{s} {p}, {x}."], PLACES),
    "German": (
        ["Gestern", "Letzte Woche", "Am Abend", "Vor zwei Jahren", "Heute Morgen", "Im Sommer", "Nach der Sitzung", "Am Wochenende", "Im Jahr {Y}", "Kurz vor Mitternacht"],
        ["der Bürgermeister", "die alte Lehrerin", "unser Nachbar", "eine junge Ärztin", "das Unternehmen", "die Polizei", "meine Schwester", "die Mannschaft", "ein Sprecher der Stadt", "{P}",
         "der Trainer", "die Feuerwehr", "der Verein", "eine Gruppe von Schülern", "die Regierung"],
        ["{N} neue Fahrräder gekauft", "über die Pläne für den Hafen gesprochen", "die Schlüssel in der Küche vergessen", "einen Preis für einen Kurzfilm gewonnen",
         "in {city} einen kleinen Laden eröffnet", "um mehr Zeit gebeten", "einen alten Brief gefunden", "einen Verlust von {H} Millionen Euro gemeldet", "die Straße nach {city} gesperrt",
         "das Dach der Schule repariert", "vor zu großen Hoffnungen gewarnt", "das Spiel in {city} mit {N} Toren gewonnen", "den Bau einer neuen Brücke beschlossen", "die Preise um {N} Prozent erhöht"],
        ["weil das Wetter schlecht war", "obwohl niemand damit gerechnet hatte", "bevor der Regen begann", "damit alle kommen konnten", "während die Kinder schliefen", "was viele überraschte",
         "aber die Arbeit ist noch nicht fertig", "denn das Geld reicht nicht aus", "wie die Zeitung berichtet", "und niemand wurde verletzt"],
        ["{t} hat {s} {p}.", "{t} hat {s} {p}, {x}.", "{s} hat {p}.", "{s} hat {p}, {x}."],
        ["Hamburg", "München", "Leipzig", "Köln", "Wien", "Zürich", "Bremen", "Dresden", "Graz", "Stuttgart", "Rostock", "Kassel", "Freiburg", "Basel"]),
    "French": (
        ["Hier", "La semaine dernière", "Ce matin", "Il y a deux ans", "Le soir", "En {Y}", "Après la réunion", "Cet été"],
        ["le maire", "notre voisin", "une jeune médecin", "l'entreprise", "la police", "ma sœur", "l'équipe", "un groupe d'élèves", "{P}"],
        ["a acheté {N} vélos", "a parlé du projet du port", "a oublié les clés dans la cuisine", "a gagné un prix", "a ouvert une petite boutique à {city}", "a demandé plus de temps",
         "a trouvé une vieille lettre", "a fermé la route de {city}", "a réparé le toit de l'école"],
        ["parce qu'il faisait mauvais", "alors que personne ne s'y attendait", "avant la pluie", "pendant que les enfants dormaient", "ce qui a surpris tout le monde", "mais le travail n'est pas fini"],
        ["{t}, {s} {p}.", "{t}, {s} {p}, {x}.", "{s} {p}, {x}."], ["Lyon", "Nantes", "Lille", "Marseille", "Genève", "Bordeaux", "Rennes", "Strasbourg"]),
    "Spanish": (
        ["Ayer", "La semana pasada", "Esta mañana", "Hace dos años", "Por la noche", "En {Y}", "Después de la reunión", "En verano"],
        ["el alcalde", "nuestro vecino", "una médica joven", "la empresa", "la policía", "mi hermana", "el equipo", "un grupo de alumnos", "{P}"],
        ["compró {N} bicicletas", "habló sobre los planes del puerto", "olvidó las llaves en la cocina", "ganó un premio", "abrió una pequeña tienda en {city}", "pidió más tiempo",
         "encontró una carta antigua", "cerró la carretera a {city}", "arregló el techo de la escuela"],
        ["porque hacía mal tiempo", "aunque nadie lo esperaba", "antes de la lluvia", "mientras los niños dormían", "lo que sorprendió a todos", "pero el trabajo no está terminado"],
        ["{t}, {s} {p}.", "{t}, {s} {p}, {x}.", "{s} {p}, {x}."], ["Sevilla", "Bilbao", "Valencia", "Lima", "Quito", "Zaragoza", "Granada", "Salamanca"]),
    "Italian": (
        ["Ieri", "La settimana scorsa", "Stamattina", "Due anni fa", "Di sera", "Nel {Y}", "Dopo la riunione"],
        ["il sindaco", "il nostro vicino", "una giovane dottoressa", "l'azienda", "la polizia", "mia sorella", "la squadra", "{P}"],
        ["ha comprato {N} biciclette", "ha parlato dei progetti per il porto", "ha dimenticato le chiavi in cucina", "ha vinto un premio", "ha aperto un piccolo negozio a {city}",
         "ha chiesto più tempo", "ha trovato una vecchia lettera", "ha chiuso la strada per {city}"],
        ["perché faceva brutto tempo", "anche se nessuno se lo aspettava", "prima della pioggia", "mentre i bambini dormivano", "ma il lavoro non è finito"],
        ["{t} {s} {p}.", "{t} {s} {p}, {x}.", "{s} {p}, {x}."], ["Torino", "Bologna", "Trieste", "Genova", "Palermo", "Verona"]),
}

# Code: (word for a name, words), function. A filter and a map are put around "the numbers".
FILTERS = [
    (("even", "the even numbers"), lambda x: x % 2 == 0), (("odd", "the odd numbers"), lambda x: x % 2 == 1), (("positive", "the positive numbers"), lambda x: x > 0),
    (("negative", "the negative numbers"), lambda x: x < 0), (("small", "the numbers below 10"), lambda x: x < 10), (("large", "the numbers above 12"), lambda x: x > 12),
    (("multiples", "the multiples of three"), lambda x: x % 3 == 0), (("nonzero", "the numbers other than zero"), lambda x: x != 0), (("all", "all numbers"), lambda x: True),
    (("two_digit", "the numbers with two digits"), lambda x: 10 <= abs(x) <= 99), (("not_fives", "the numbers that five does not divide"), lambda x: x % 5 != 0),
]
MAPS = [("{}", lambda x: x), ("the squares of {}", lambda x: x * x), ("the absolute values of {}", abs), ("{}, each doubled", lambda x: 2 * x), ("{}, each less one", lambda x: x - 1),
        ("the last digits of {}", lambda x: abs(x) % 10), ("the sums of digits of {}", lambda x: sum(map(int, str(abs(x))))), ("{}, each cubed", lambda x: x ** 3)]
REDUCTIONS = [("the sum", sum), ("the number", len), ("the largest, or None where there is none,", lambda v: max(v, default=None)), ("a sorted list", sorted),
              ("the list", list), ("the smallest, or 0 where there is none,", lambda v: min(v, default=0)), ("a list without repetition", lambda v: list(dict.fromkeys(v))),
              ("the list in reverse order", lambda v: v[::-1]), ("the running sums", lambda v: [sum(v[:i + 1]) for i in range(len(v))])]
VOWELS = "aeiouAEIOU"
TEXT_TASKS = [
    ("count_vowels", "how many vowels the text has", lambda s, k: sum(c in VOWELS for c in s)), ("reverse_words", "the words in reverse order", lambda s, k: " ".join(s.split()[::-1])),
    ("is_palindrome", "whether the text reads the same backwards, without regard to case and spaces", lambda s, k: (t := s.replace(" ", "").lower()) == t[::-1]),
    ("longest_word", "the longest word, the first one where several are equally long", lambda s, k: max(s.split(), key=len)), ("initials", "the first letters of all words in upper case", lambda s, k: "".join(w[0] for w in s.split()).upper()),
    ("letter_counts", "a dictionary from each letter to the number of its occurrences, spaces left out", lambda s, k: {c: s.count(c) for c in s if c != " "}),
    ("swap_case", "the text with upper and lower case exchanged", lambda s, k: s.swapcase()), ("every_nth", "every {k}th character, beginning with the first", lambda s, k: s[::k]),
    ("shift_letters", "the text with each letter moved {k} places on in the alphabet, z followed by a", lambda s, k: "".join(chr((ord(c) - (b := 97 if c.islower() else 65) + k) % 26 + b) if c.isalpha() else c for c in s)),
    ("short_words", "the list of words with at most {k} letters", lambda s, k: [w for w in s.split() if len(w) <= k]), ("word_lengths", "the lengths of the words as a list", lambda s, k: [len(w) for w in s.split()]),
    ("remove_vowels", "the text without its vowels", lambda s, k: "".join(c for c in s if c not in VOWELS)), ("repeat_letters", "the text with each letter repeated {k} times", lambda s, k: "".join(c * k for c in s)),
    ("double_letters", "how often two equal letters follow one another", lambda s, k: sum(a == b for a, b in zip(s, s[1:]))), ("title_words", "the text with each word capitalized", lambda s, k: s.title()),
    ("sort_words", "the words sorted by length and then by the alphabet", lambda s, k: sorted(s.split(), key=lambda w: (len(w), w))), ("unique_letters", "the number of different letters, case ignored", lambda s, k: len(set(s.lower()) - {" "})),
]
NUMBER_TASKS = [
    ("digit_sum", "the sum of the decimal digits", lambda n, k: sum(map(int, str(n)))), ("divisors", "the sorted list of all divisors", lambda n, k: [d for d in range(1, n + 1) if n % d == 0]),
    ("is_prime", "whether the number is a prime", lambda n, k: n > 1 and all(n % d for d in range(2, n))), ("to_binary", "the binary digits as a string", lambda n, k: f"{n:b}"),
    ("collatz_steps", "how many steps of halving even numbers and replacing odd n by 3n + 1 lead to 1", lambda n, k: collatz(n)), ("count_multiples", "how many numbers from 1 on up to it are multiples of {k}", lambda n, k: n // k),
    ("reverse_digits", "the number with its digits in reverse order", lambda n, k: int(str(n)[::-1])), ("prime_factors", "the list of prime factors with repetition, smallest first", lambda n, k: factors(n)),
    ("square_root_floor", "the largest whole number whose square is not larger", lambda n, k: int(n ** 0.5)), ("sum_below", "the sum of all numbers below it that {k} does not divide", lambda n, k: sum(i for i in range(n) if i % k)),
    ("to_base", "the digits in base {k}, most significant first, as a list", lambda n, k: digits(n, k)), ("next_multiple", "the smallest multiple of {k} that is larger", lambda n, k: (n // k + 1) * k),
    ("is_perfect_square", "whether the number is the square of a whole number", lambda n, k: int(n ** 0.5) ** 2 == n), ("ones_in_binary", "the number of ones among the binary digits", lambda n, k: f"{n:b}".count("1")),
]


def collatz(n):
    steps = 0
    while n != 1:
        n, steps = n // 2 if n % 2 == 0 else 3 * n + 1, steps + 1
    return steps


def factors(n):
    found, d = [], 2
    while n > 1:
        if n % d == 0:
            found.append(d)
            n //= d
        else:
            d += 1
    return found


def digits(n, base):
    return (digits(n // base, base) if n >= base else []) + [n % base]


CODE_ASKS = [
    "Write a {lang} program that reads numbers from a file and prints their mean and their median.", "Write a {lang} class for a queue of at most {N} elements.",
    "How do I read a CSV file in {lang} and sum its column {N}?", "Show how to sort records by two fields in {lang}.", "Write a regular expression for dates like {D} and explain it.",
    "Write a {lang} function that merges two sorted lists of {X} records.", "Explain the difference between a list and a tuple in Python with an example about {hobby}.",
    "Write an SQL query that lists the {N} customers from {L} with the highest sales.", "Write HTML for a page of {company} with a form for {event}.",
    "Write a shell script that renames all files in a folder to {X}_1, {X}_2 and so on.", "Implement a stack in {lang} that also knows its smallest element, for {M} elements.",
    "Write a {lang} game in which the user guesses a number from 1 to {H}.", "Write unit tests for a function that computes the price of {N} {gadget}s with a discount.",
    "Design a small {lang} data model for {company}: which classes and fields are needed?", "Write a {lang} function that finds the shortest path in a grid of {N} by {N2} cells.",
    "How can I make a slow {lang} loop over {M} rows faster?", "Write a {lang} function that counts how many of {H} random walks return to the start.",
]
SNIPPETS = [
    "def f({v}):\n    out = []\n    for i in range(len({v})):\n        if {v}[i] % {n} == 0:\n            out.append({v}[i])\n    return out",
    "def f({v}):\n    best = {v}[0]\n    for x in {v}:\n        if x > best:\n            best = x\n    return best - {n}",
    "def f(n):\n    if n <= {n}:\n        return 1\n    return f(n - 1) + f(n - 2)", "def f({v}):\n    return {{k: len([x for x in {v} if x == k]) for k in set({v})}}",
    "def f({v}, k={n}):\n    while len({v}) > k:\n        {v}.pop()\n    return {v}", "total = 0\nfor i in range({n}, 100, {n}):\n    if i % 2:\n        continue\n    total += i\nprint(total)",
    "def f(s):\n    d = {{}}\n    for c in s:\n        d[c] = d.get(c, 0) + 1\n    return max(d, key=d.get) * {n}", "def f({v}):\n    for i in range(len({v})):\n        for j in range(len({v}) - 1):\n"
    "            if {v}[j] > {v}[j + 1]:\n                {v}[j], {v}[j + 1] = {v}[j + 1], {v}[j]\n    return {v}[:{n}]",
    "def f(a, b):\n    while b:\n        a, b = b, a % b\n    return a * {n}", "def f({v}):\n    return sum({v}) / len({v}) if len({v}) > {n} else None",
]
