//! Judges that can be computed: they stand for the people whose preferences are learnt, so that what was learnt can be checked.

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};

/// What a judge looks for in an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Judge {
    /// Few words.
    Shorter,
    /// Many words.
    Longer,
    /// Few commas.
    FewerCommas,
    /// Speaks of I and you: their share of the words.
    FirstPerson,
    /// Short words: minus the mean of their lengths in letters.
    PlainWords,
    /// Kind words rather than unkind ones: how many more there are, as a share of all words.
    Sentiment,
    /// Ends as sentences do, with `.`, `!` or `?`: 1 or 0.
    FullStop,
    /// Has a list, of two items at least: 1 or 0.
    List,
    /// Comes to the reference's final number: 1 or 0.
    Correct,
    /// The first judge's score with this weight (0 to 1) and the second's with the rest, each in its [unit](Judge::unit).
    Mix(Box<Judge>, Box<Judge>, f64),
}

impl Judge {
    /// Names of all but mixtures.
    pub const NAMES: [&str; 9] = [
        "shorter",
        "longer",
        "fewer-commas",
        "first-person",
        "plain-words",
        "sentiment",
        "full-stop",
        "list",
        "correct",
    ];

    /// The judge of a name, or `mix:FIRST:SECOND:WEIGHT`, say `mix:shorter:first-person:0.3`, whose parts may be mixtures too.
    ///
    /// # Errors
    /// `Usage`: no such name; a weight that is not from 0 to 1.
    pub fn parse(text: &str) -> Result<Self> {
        let mut words = text.split(':');
        let judge = Self::next(&mut words).context(|| format!("the judge {text:?}"))?;
        ensure!(words.next().is_none(), Usage, "the judge {text:?}: more words than it takes");
        Ok(judge)
    }

    fn next<'a>(words: &mut impl Iterator<Item = &'a str>) -> Result<Self> {
        Ok(match words.next().unwrap_or_default() {
            "shorter" => Self::Shorter,
            "longer" => Self::Longer,
            "fewer-commas" => Self::FewerCommas,
            "first-person" => Self::FirstPerson,
            "plain-words" => Self::PlainWords,
            "sentiment" => Self::Sentiment,
            "full-stop" => Self::FullStop,
            "list" => Self::List,
            "correct" => Self::Correct,
            "mix" => {
                let (first, second) = (Self::next(words)?, Self::next(words)?);
                let word = words.next().unwrap_or_default();
                let weight = word.parse().ok().filter(|w| (0.0..=1.0).contains(w));
                let bad = || Error::new(ErrorKind::Usage, format!("{word:?} is no weight from 0 to 1"));
                Self::Mix(Box::new(first), Box::new(second), weight.ok_or_else(bad)?)
            }
            other => bail!(Usage, "{other:?} is none; there are {}, mix:FIRST:SECOND:WEIGHT", Self::NAMES.join(", ")),
        })
    }

    /// How good `answer` is, in the judge's own measure: more is better. An answer without words has a score of 0 where it is one of words. The
    /// prompt is not looked at by any judge so far.
    ///
    /// # Errors
    /// `Usage`: no reference, or one without a number, where the judge compares with it.
    // That no judge so far looks at the prompt is nothing that callers should rely on.
    #[allow(clippy::only_used_in_recursion)]
    pub fn score(&self, prompt: &str, answer: &str, reference: Option<&str>) -> Result<f64> {
        let count = || words(answer).count() as f64;
        let per_word = |sum: f64| sum / count().max(1.0);
        Ok(match self {
            // 0 minus: there are no negative zeros among the scores.
            Self::Shorter => 0.0 - count(),
            Self::Longer => count(),
            Self::FewerCommas => 0.0 - answer.matches([',', '，', '、', '،']).count() as f64,
            Self::FirstPerson => {
                per_word(words(answer).filter(|w| I_AND_YOU.contains(&stem(&w.to_lowercase()))).count() as f64)
            }
            Self::PlainWords => {
                let letters = |w: &str| w.chars().filter(|c| c.is_alphanumeric()).count();
                0.0 - per_word(words(answer).map(letters).sum::<usize>() as f64)
            }
            Self::Sentiment => {
                let tone = |w: &str| {
                    let w = &*w.to_lowercase();
                    i32::from(KIND.contains(&w)) - i32::from(UNKIND.contains(&w))
                };
                per_word(f64::from(words(answer).map(tone).sum::<i32>()))
            }
            Self::FullStop => {
                let closers = |c: char| c.is_whitespace() || "\"'”’»)]*_".contains(c);
                f64::from(answer.trim_end_matches(closers).ends_with(['.', '!', '?', '。', '！', '？']))
            }
            Self::List => f64::from(answer.lines().filter(|l| is_item(l)).count() >= 2),
            Self::Correct => {
                let Some(reference) = reference else { bail!(Usage, "the judge \"correct\" needs a reference") };
                let Some(right) = final_number(reference) else {
                    bail!(Usage, "the reference {reference:?} has no number");
                };
                f64::from(final_number(answer) == Some(right))
            }
            Self::Mix(first, second, weight) => {
                let score = |j: &Self| Ok::<_, Error>(j.score(prompt, answer, reference)? / j.unit());
                weight * score(first)? + (1.0 - weight) * score(second)?
            }
        })
    }

    /// A typical difference of two answers' scores: ten words, two commas, one word in twenty, half a letter, yes or no.
    pub fn unit(&self) -> f64 {
        match self {
            Self::Shorter | Self::Longer => 10.0,
            Self::FewerCommas => 2.0,
            Self::FirstPerson | Self::Sentiment => 0.05,
            Self::PlainWords => 0.5,
            Self::FullStop | Self::List | Self::Correct | Self::Mix(..) => 1.0,
        }
    }
}

/// A judge that answers as Bradley and Terry (1952) have it: P(the first is better) = sigmoid(strength (s₁ - s₂) / unit).
#[derive(Clone, Debug, PartialEq)]
pub struct Bradley {
    /// What it looks for.
    pub judge: Judge,
    /// How sure it is of a difference of one unit, in log-odds; infinite: it always takes the better one.
    pub strength: f64,
    /// What differences of scores are divided by; greater than 0.
    pub unit: f64,
}

impl Bradley {
    /// In the judge's own unit.
    pub fn new(judge: Judge, strength: f64) -> Self {
        Self { unit: judge.unit(), judge, strength }
    }

    /// Of strength 1 in units of half the standard deviation of `scores`: such scores standardised, times 2, are log-odds. Scores that are all the
    /// same have the judge's own unit.
    pub fn standardised(judge: Judge, scores: &[f64]) -> Self {
        let n = scores.len().max(1) as f64;
        let mean = scores.iter().sum::<f64>() / n;
        let deviation = (scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / n).sqrt();
        let unit = if deviation > 0.0 { deviation / 2.0 } else { judge.unit() };
        Self { judge, strength: 1.0, unit }
    }

    /// Whether the first of two answers is better: 1, 0, or 1/2 where that is undecided (equal scores at infinite strength). `uniform` is a
    /// random number in [0, 1) that decides what is left to chance.
    pub fn prefer(&self, [first, second]: [f64; 2], uniform: f64) -> f64 {
        if self.strength.is_infinite() {
            return if first == second { 0.5 } else { f64::from(first > second) };
        }
        // e^-x is infinite where x is far below 0: the probability is 0 then, as it should be.
        let p = 1.0 / (1.0 + (-self.strength * (first - second) / self.unit).exp());
        f64::from(uniform < p)
    }
}

/// The number that an answer comes to: the first one behind its last `####`, where there is that mark, else the last of all. Thousands may
/// have commas; signs and currencies may stand before it; equal numbers are equal texts (`1800` of `$1,800.00`, `0.5` of `.50`).
pub fn final_number(text: &str) -> Option<String> {
    match text.rsplit_once("####") {
        Some((_, behind)) => numbers(behind).into_iter().next(),
        None => numbers(text).pop(),
    }
}

fn numbers(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let digits = |at: usize| chars[at.min(chars.len())..].iter().take_while(|c| c.is_ascii_digit()).count();
    let is = |at: usize, c: char| chars.get(at) == Some(&c);
    let (mut found, mut i) = (Vec::new(), 0);
    while i < chars.len() {
        let (start, mut whole) = (i, String::new());
        let n = digits(i);
        whole.extend(&chars[i..i + n]);
        i += n;
        while (1..=3).contains(&n) && is(i, ',') && digits(i + 1) == 3 {
            whole.extend(&chars[i + 1..i + 4]);
            i += 4;
        }
        let mut fraction = String::new();
        // The year of 12.05.2024 is a number of its own.
        let goes_on = n == 0 && start > 0 && chars[start - 1].is_ascii_digit();
        if !goes_on && is(i, '.') && digits(i + 1) > 0 {
            let end = i + 1 + digits(i + 1);
            fraction.extend(&chars[i + 1..end]);
            i = end;
        }
        if i == start {
            i += 1;
            continue;
        }
        let (whole, fraction) = (whole.trim_start_matches('0'), fraction.trim_end_matches('0'));
        let zero = whole.is_empty() && fraction.is_empty();
        let sign = if is_negative(&chars[..start]) && !zero { "-" } else { "" };
        let whole = if whole.is_empty() { "0" } else { whole };
        let point = if fraction.is_empty() { "" } else { "." };
        found.push(format!("{sign}{whole}{point}{fraction}"));
    }
    found
}

/// Whether a number behind `before` has a minus: one that is not between two things (`10-5`).
fn is_negative(before: &[char]) -> bool {
    let before = match before {
        [rest @ .., '$' | '€' | '£' | '¥'] => rest,
        all => all,
    };
    match before {
        [rest @ .., '-' | '−'] => !rest.last().is_some_and(|c| c.is_alphanumeric() || ")]%".contains(*c)),
        _ => false,
    }
}

/// Runs of what is neither blank nor punctuation, apostrophes excepted: a letter with a combining accent stays one.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let apostrophe = |c: char| c == '\'' || c == '’';
    let between = move |c: char| {
        c.is_whitespace() || (c.is_ascii_punctuation() && c != '\'') || "–—…“”„‘«»¿¡、。，！？：；（）「」".contains(c)
    };
    let parts = text.split(between).map(move |w| w.trim_matches(apostrophe));
    parts.filter(|w| w.chars().any(char::is_alphanumeric))
}

/// A word without what stands behind its apostrophe: `you` of `you're`.
fn stem(word: &str) -> &str {
    word.split(['\'', '’']).next().unwrap_or(word)
}

/// Whether a line is one of a list: a bullet or a number, a blank, and something.
fn is_item(line: &str) -> bool {
    let line = line.trim();
    let numbered = line.trim_start_matches(|c: char| c.is_ascii_digit());
    let behind = match numbered.len() < line.len() {
        true => numbered.strip_prefix(['.', ')']),
        false => line.strip_prefix(['-', '*', '+', '•', '–']),
    };
    behind.is_some_and(|rest| rest.starts_with(char::is_whitespace))
}

const I_AND_YOU: [&str; 10] = ["i", "me", "my", "mine", "myself", "you", "your", "yours", "yourself", "yourselves"];

#[rustfmt::skip]
const KIND: [&str; 72] = [
    "admire", "amazing", "beautiful", "beauty", "best", "better", "bless", "bliss", "bright", "calm", "care", "caring",
    "charming", "cheer", "cheerful", "comfort", "cosy", "courage", "delicious", "delight", "delightful", "easy", "enjoy", "enjoyable",
    "excellent", "exciting", "fair", "fine", "fond", "free", "friend", "friendly", "fun", "generous", "gentle", "glad",
    "good", "grateful", "great", "happiness", "happy", "harmony", "helpful", "honest", "hope", "hopeful", "inspiring", "joy",
    "kind", "kindness", "laugh", "like", "love", "lovely", "loving", "lucky", "nice", "peace", "peaceful", "perfect",
    "pleasant", "pleasure", "pretty", "proud", "safe", "smile", "splendid", "success", "sweet", "thank", "warm", "wonderful",
];

#[rustfmt::skip]
const UNKIND: [&str; 72] = [
    "afraid", "alone", "anger", "angry", "annoying", "anxious", "ashamed", "awful", "bad", "bitter", "blame", "boring",
    "broken", "cold", "cruel", "cry", "damage", "danger", "dangerous", "dark", "dead", "death", "despair", "dirty",
    "disaster", "dull", "enemy", "evil", "fail", "failure", "fear", "fight", "foolish", "grief", "guilty", "harm",
    "harsh", "hate", "horrible", "hurt", "ill", "jealous", "kill", "lonely", "lose", "loss", "mean", "misery",
    "nasty", "never", "noisy", "pain", "painful", "poor", "problem", "rude", "sad", "scared", "selfish", "sick",
    "sorrow", "sorry", "stupid", "suffer", "terrible", "tired", "trouble", "ugly", "unhappy", "war", "worse", "worst",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn score(name: &str, answer: &str) -> f64 {
        Judge::parse(name).unwrap().score("a prompt", answer, Some("#### 18")).unwrap()
    }

    #[test]
    fn judges_score_what_they_look_for() {
        assert_eq!((score("shorter", "One, two -- three."), score("longer", "One, two -- three.")), (-3.0, 3.0));
        assert_eq!(score("longer", "Don’t split don't; well-known is two."), 7.0);
        assert_eq!(score("fewer-commas", "a, b,c， d、e"), -4.0);
        assert_eq!(score("first-person", "I'm sure you’re right, MY dear; yourselves, not him."), 4.0 / 9.0);
        assert_eq!(score("first-person", "Ice is in the mine shaft of Yousef."), 1.0 / 8.0);
        assert_eq!(score("plain-words", "It is a cat."), -(2.0 + 2.0 + 1.0 + 3.0) / 4.0);
        assert_eq!(score("sentiment", "Good, GREAT weather; a terrible day"), 1.0 / 6.0);
        assert_eq!(score("sentiment", "I hate this awful, ugly war"), -4.0 / 6.0);
        let ends = ["Yes.", "Yes!  \n", "He said \"yes?\"", "(Yes.)", "**Yes.**", "はい。"];
        assert!(ends.iter().all(|e| score("full-stop", e) == 1.0));
        assert!(["Yes", "Yes:", "1. Yes, and", "", "..."].map(|e| score("full-stop", e)) == [0.0, 0.0, 0.0, 0.0, 1.0]);
        let lists = ["- a\n- b", "Two:\n 1. a\n 2) b\n", "• a\n\ttext\n• b", "10. ten\n11. eleven"];
        assert!(lists.iter().all(|l| score("list", l) == 1.0));
        let none = ["- a", "-a\n-b", "1.5 litres\n2.5 litres", "2020\n2021", "**a**\n**b**", "", "1.\n2."];
        assert!(none.iter().all(|l| score("list", l) == 0.0));
        assert_eq!(["It is 18.", "#### 18.0 apples", "17", ""].map(|a| score("correct", a)), [1.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn what_is_not_plain_text_is_scored_too() {
        for name in Judge::NAMES {
            for odd in ["", " \n", "...", "🙂", "e\u{301}te\u{301}", "ß ﬁ İ", "漢字", "\u{0}\u{feff}", "''"] {
                let s = score(name, odd);
                assert!(s.is_finite() && (s != 0.0 || s.is_sign_positive()), "{name} of {odd:?}: {s}");
            }
        }
        assert_eq!(score("longer", "un e\u{301}te\u{301} — chaud"), 3.0);
        assert_eq!((score("longer", "🙂 …"), score("plain-words", "")), (0.0, 0.0));
    }

    #[test]
    fn names_are_judges_and_mixtures_weigh() {
        for name in Judge::NAMES {
            let judge = Judge::parse(name).unwrap();
            assert_eq!(serde_json::to_value(&judge).unwrap(), name);
            assert!(judge.unit() > 0.0);
        }
        let mix = Judge::parse("mix:shorter:first-person:0.3").unwrap();
        assert_eq!(mix, Judge::Mix(Box::new(Judge::Shorter), Box::new(Judge::FirstPerson), 0.3));
        let got = mix.score("", "You two words", None).unwrap();
        assert!((got - (0.3 * -3.0 / 10.0 + 0.7 * (1.0 / 3.0) / 0.05)).abs() < 1e-12);
        let json = serde_json::to_string(&mix).unwrap();
        assert_eq!(serde_json::from_str::<Judge>(&json).unwrap(), mix);
        let nested = Judge::parse("mix:mix:list:full-stop:0.5:longer:1").unwrap();
        assert_eq!(nested.score("", "Yes.", None).unwrap(), 0.5);
        let bad = ["", "Shorter", "shorter:longer", "mix", "mix:shorter", "mix:shorter:longer", "mix:a:longer:0.5"];
        let worse = ["mix:shorter:longer:1.5", "mix:shorter:longer:NaN", "mix:shorter:longer:x", "mix:list:list:0:0"];
        for text in bad.into_iter().chain(worse) {
            let e = Judge::parse(text).unwrap_err();
            assert!(e.kind() == ErrorKind::Usage && e.to_string().contains(&format!("{text:?}")), "{e}");
        }
        let lacks = |reference| Judge::Correct.score("", "18", reference).unwrap_err().to_string();
        assert!(lacks(None).contains("reference") && lacks(Some("none")).contains("no number"));
    }

    #[test]
    fn lists_of_words_have_no_word_twice() {
        let mut all: Vec<&str> = KIND.into_iter().chain(UNKIND).collect();
        all.sort_unstable();
        assert!(all.windows(2).all(|w| w[0] < w[1]));
        assert!(all.iter().all(|w| w.chars().all(|c| c.is_ascii_lowercase())));
    }

    #[test]
    fn preferences_follow_the_law() {
        let mut judge = Bradley { judge: Judge::Longer, strength: 2.0, unit: 4.0 };
        // sigmoid(2 * 2 / 4) = 0.731...
        assert_eq!([0.0, 0.73, 0.732, 0.999].map(|u| judge.prefer([5.0, 3.0], u)), [1.0, 1.0, 0.0, 0.0]);
        assert_eq!([0.268, 0.27].map(|u| judge.prefer([3.0, 5.0], u)), [1.0, 0.0]);
        assert_eq!([0.49, 0.5].map(|u| judge.prefer([3.0, 3.0], u)), [1.0, 0.0]);
        assert_eq!([judge.prefer([-1e9, 1e9], 0.0), judge.prefer([1e9, -1e9], 0.999)], [0.0, 1.0]);
        judge.strength = f64::INFINITY;
        assert_eq!([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]].map(|s| judge.prefer(s, 0.9)), [1.0, 0.0, 0.5]);
        assert_eq!(Bradley::new(Judge::List, 3.0).unit, 1.0);
        assert_eq!(Bradley::standardised(Judge::Shorter, &[-2.0, 0.0, 2.0, 0.0]).unit, 2f64.sqrt() / 2.0);
        for same in [&[][..], &[3.0], &[1.0, 1.0]] {
            assert_eq!(Bradley::standardised(Judge::Shorter, same), Bradley::new(Judge::Shorter, 1.0));
        }
    }

    #[test]
    fn numbers_are_found_and_made_equal() {
        let cases = [
            ("12 * 100 = 1,200.\n#### 1,200", Some("1200")),
            ("#### 5\n#### 7 \nAnd so on: 9.", Some("7")),
            ("A: 18", Some("18")),
            ("The answer is $1,800.", Some("1800")),
            ("It costs -$3.50", Some("-3.5")),
            ("$-3.50 or −4", Some("-4")),
            ("x=-7", Some("-7")),
            ("from 10-5", Some("5")),
            ("5 - 3", Some("3")),
            ("(2)-1", Some("1")),
            ("18.00", Some("18")),
            (".50", Some("0.5")),
            ("007", Some("7")),
            ("-0.0", Some("0")),
            ("12,34", Some("34")),
            ("1,2345", Some("2345")),
            ("1,234,567.80kg", Some("1234567.8")),
            ("1234,567", Some("567")),
            ("3.", Some("3")),
            ("12.05.2024", Some("2024")),
            ("50%", Some("50")),
            ("größer als 8 Äpfel 🙂", Some("8")),
            ("123456789012345678901234567890", Some("123456789012345678901234567890")),
            ("", None),
            ("none, . - $", None),
            ("18 ####", None),
            ("１８", None),
        ];
        for (text, want) in cases {
            assert_eq!(final_number(text).as_deref(), want, "{text:?}");
        }
    }
}
