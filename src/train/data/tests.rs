use super::*;
use crate::error::bail;
use crate::rng::Rng;
use std::io::Write;

/// One token a character, except that "ab" is one; 1 before a text, 2 and 3 end one.
struct Toy {
    /// Earlier answers vanish once other turns follow.
    forgets: bool,
    ends: &'static [u32],
}

impl Encode for Toy {
    fn encode(&self, text: &str, start: bool) -> Result<Vec<u32>> {
        let mut ids = if start { vec![1] } else { vec![] };
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            ids.push(match c {
                'a' if chars.next_if_eq(&'b').is_some() => 500,
                '#' => 2,
                '$' => 3,
                c => c as u32,
            });
        }
        Ok(ids)
    }

    fn render(&self, turns: &[Turn], open: bool) -> Result<String> {
        if turns.first().is_some_and(|t| t.role == "assistant") {
            bail!(Tokenizer, "the user speaks first");
        }
        let mut text = String::from("^");
        for (i, t) in turns.iter().enumerate() {
            let content = if self.forgets && t.role == "assistant" && i + 1 < turns.len() { "" } else { &t.content };
            text += &format!("{}:{content}#\n", &t.role[..1]);
        }
        Ok(if open { text + "a:" } else { text })
    }

    fn ends(&self) -> &[u32] {
        self.ends
    }
}

const TOY: Toy = Toy { forgets: false, ends: &[2, 3] };

/// Tokens as text, and the labels among them.
fn shown(e: &Example) -> (String, String) {
    let char = |t: u32| match t {
        500 => 'X',
        1 => '<',
        2 => '#',
        3 => '$',
        t => char::from_u32(t).unwrap(),
    };
    let text = e.tokens.iter().map(|&t| char(t)).collect();
    (text, e.tokens.iter().zip(&e.loss).filter(|(_, l)| **l).map(|(&t, _)| char(t)).collect())
}

fn one(row: &str, options: &Options) -> (String, String) {
    shown(&example(&Record::parse(row, 1).unwrap().unwrap(), &TOY, options).unwrap())
}

fn own(a: &str, b: &str) -> (String, String) {
    (a.into(), b.into())
}

#[test]
fn each_form_marks_what_is_learnt() {
    let plain = Options::default();
    assert_eq!(one(r#"{"text": "hello", "id": 4}"#, &plain), own("<hello#", "hello#"));
    assert_eq!(one(r#"{"text": "hello$"}"#, &plain), own("<hello$", "hello$"));
    assert_eq!(one(r#"{"text": "hello"}"#, &Options { append_eos: false, ..plain.clone() }), own("<hello", "hello"));
    assert_eq!(one(r#"{"prompt": "x", "completion": "yz"}"#, &plain), own("<xyz#", "yz#"));
    // The boundary is one between tokens, whatever the tokenizer would make of the whole.
    assert_eq!(one(r#"{"prompt": "xa", "completion": "bz"}"#, &plain), own("<xabz#", "bz#"));
    assert_eq!(one(r#"{"prompt": "x", "completion": "abz"}"#, &plain), own("<xXz#", "Xz#"));
    assert_eq!(one(r#"{"question": "1+1?", "answer": "2"}"#, &plain), own("<1+1?\n2#", "2#"));
    assert_eq!(one(r#"{"split": "train", "input": "q\n", "label": "no"}"#, &plain), own("<q\nno#", "no#"));
    let chat = Options { pairs: Pairs::Chat, ..plain.clone() };
    assert_eq!(one(r#"{"question": "1+1?", "answer": "2"}"#, &chat), own("^u:1+1?#\na:2#\n", "2#"));
}

#[test]
fn of_a_conversation_the_assistants_turns_are_learnt() {
    let turn = |r: &str, c: &str| format!(r#"{{"role": "{r}", "content": "{c}"}}"#);
    let row = |turns: &[String]| format!(r#"{{"messages": [{}]}}"#, turns.join(","));
    let (u, a) = (|c| turn("user", c), |c| turn("assistant", c));
    let options = Options::default();
    let long = row(&[turn("system", "s"), u("q"), a("one"), u("r"), a("two"), u("end")]);
    assert_eq!(one(&long, &options), own("^s:s#\nu:q#\na:one#\nu:r#\na:two#\nu:end#\n", "one#two#"));
    // An end token in the answer does not hide what follows it.
    assert_eq!(one(&row(&[u("q"), a("x$y")]), &options).1, "x$y#");

    // Without end tokens there is nothing to tell where the turn ends, so all of it is learnt.
    let record = Record::parse(&row(&[u("q"), a("x"), u("r")]), 1).unwrap().unwrap();
    let endless = example(&record, &Toy { ends: &[], ..TOY }, &options).unwrap();
    assert_eq!(shown(&endless).1, "x#\n");

    let fails = |row: &str, toy: &Toy| {
        let record = Record::parse(row, 1).unwrap().unwrap();
        example(&record, toy, &options).unwrap_err().to_string()
    };
    assert!(fails(&row(&[u("q")]), &TOY).contains("no message of the role"));
    assert!(fails(&row(&[a("q")]), &TOY).contains("the user speaks first"));
    let e = fails(&long, &Toy { forgets: true, ..TOY });
    assert!(e.contains("changes earlier turns once message 5 (assistant) follows"), "{e}");
}

fn load(name: &str, bytes: &[u8], options: &Options) -> Result<Dataset> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    Dataset::load(&path, &TOY, options)
}

fn packed(text: &str) -> Vec<u8> {
    let mut z = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    z.write_all(text.as_bytes()).unwrap();
    z.finish().unwrap()
}

#[test]
fn files_packed_or_not() {
    let text = "{\"text\": \"one\"}\n{\"prompt\": \"p\", \"completion\": \"c\"}\r\n\n \n";
    let options = Options::default();
    let plain = load("d.jsonl", text.as_bytes(), &options).unwrap();
    assert_eq!(plain.examples.iter().map(shown).collect::<Vec<_>>(), [own("<one#", "one#"), own("<pc#", "c#")]);
    assert_eq!(load("d.jsonl.gz", &packed(text), &options).unwrap(), plain);
    // Several members, as `cat a.gz b.gz` makes them.
    let (a, b) = text.split_at(16);
    assert_eq!(load("d.jsonl.gz", &[packed(a), packed(b)].concat(), &options).unwrap(), plain);

    let task = "{\"task\": \"t\", \"labels\": [\"y\"]}\n{\"split\": \"train\", \"input\": \"i\", \"label\": \"y\"}\n\
                {\"split\": \"test\", \"input\": \"j\", \"label\": \"y\"}";
    let read = |split: &str| load("t.jsonl", task.as_bytes(), &Options { split: split.into(), ..options.clone() });
    assert_eq!(shown(&read("train").unwrap().examples[0]).0, "<i\ny#");
    assert_eq!(shown(&read("test").unwrap().examples[0]).0, "<j\ny#");
    assert!(read("dev").unwrap_err().to_string().contains("no row to learn from"));
}

#[test]
fn a_document_comes_in_windows_that_learn_every_token_once() {
    let text: String = (0..57).map(|i| char::from(b'c' + i % 20)).collect();
    for max_tokens in [2, 3, 10, 58, 59, 100] {
        let set = load("d.txt", text.as_bytes(), &Options { max_tokens, ..Options::default() }).unwrap();
        let labels: String = set.examples.iter().map(|e| shown(e).1).collect();
        assert_eq!(labels, format!("{text}#"), "windows of {max_tokens}");
        assert!(set.examples.iter().all(|e| e.tokens.len() <= max_tokens && !e.loss[0]));
        let next = set.examples.windows(2).all(|w| w[0].tokens.last() == w[1].tokens.first());
        assert!(next && set.examples.len() == 58usize.div_ceil(max_tokens - 1));
    }
    let options = Options { append_eos: false, ..Options::default() };
    assert!(load("d.txt", b"", &options).unwrap_err().to_string().contains("no row to learn from"));
}

#[test]
fn bad_rows_are_named() {
    let good = "{\"text\": \"fine\"}\n";
    let options = Options { max_tokens: 10, ..Options::default() };
    let bad: [(&[u8], &str); 16] = [
        (b"\n{\"text\": \"x\"}", "blank, but rows follow"),
        (b"{\"text\": \"x\"", "not JSON"),
        (b"{\"text\": \"x\"} {}", "column 15"),
        (b"[1]", "expected a JSON object"),
        (b"{\"body\": \"x\"}", "the row has [\"body\"]"),
        (b"{\"prompt\": \"x\"}", "the row has [\"prompt\"]"),
        (b"{\"text\": 4}", "\"text\" is a number"),
        (b"{\"prompt\": \"x\", \"completion\": null}", "\"completion\" is null"),
        (b"{\"text\": \"x\", \"messages\": [{\"role\": \"user\", \"content\": \"\"}]}", "ambiguous"),
        (b"{\"messages\": {}}", "\"messages\" is an object"),
        (b"{\"messages\": []}", "\"messages\" is empty"),
        (b"{\"messages\": [[]]}", "message 1 is a list"),
        (b"{\"messages\": [{\"role\": \"user\"}]}", "message 1: \"content\" is missing"),
        (b"{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}", "no message of the role"),
        (b"{\"text\": \"more than ten\"}", "15 tokens, more than the limit of 10; --long-rows truncate"),
        (b"{\"text\": \"\xFF\"}", "not UTF-8"),
    ];
    for (row, what) in bad {
        let e = load("d.jsonl", &[good.as_bytes(), row].concat(), &options).unwrap_err();
        let text = e.to_string();
        assert!(e.kind() == ErrorKind::Usage && text.contains("d.jsonl, line 2: ") && text.contains(what), "{text}");
    }
    let silent = Options { append_eos: false, ..options.clone() };
    let e = load("d.jsonl", b"{\"prompt\": \"x\", \"completion\": \"\"}", &silent).unwrap_err().to_string();
    assert!(e.contains("line 1: no token to learn"), "{e}");
    let e = load("d.csv", b"", &options).unwrap_err().to_string();
    assert!(e.contains("d.csv: expected a .jsonl"), "{e}");
    let e = load("d.txt", b"ok\n\xFF", &options).unwrap_err().to_string();
    assert!(e.contains("d.txt, line 2: not UTF-8"), "{e}");
}

#[test]
fn a_packed_file_that_is_cut_short_is_named() {
    let file = packed(&"{\"text\": \"a row\"}\n".repeat(50));
    for cut in [3, 12, file.len() / 2, file.len() - 9, file.len() - 1] {
        let e = load("d.jsonl.gz", &file[..cut], &Options::default()).unwrap_err();
        assert!(e.kind() == ErrorKind::Usage && e.to_string().contains("d.jsonl.gz: cut short"), "{cut}: {e}");
    }
    let mut flipped = file.clone();
    flipped[file.len() - 6] ^= 1;
    assert!(load("d.jsonl.gz", &flipped, &Options::default()).is_err());
    assert!(load("d.jsonl.gz", b"{\"text\": \"not packed\"}", &Options::default()).is_err());
}

#[test]
fn long_rows_are_cut_or_left_out() {
    let rows = b"{\"text\": \"short\"}\n{\"prompt\": \"1234567\", \"completion\": \"890123\"}";
    let read = |long_rows, max_tokens| load("d.jsonl", rows, &Options { long_rows, max_tokens, ..Options::default() });
    let skip = read(LongRows::Skip, 10).unwrap();
    assert_eq!((skip.examples.len(), skip.skipped, skip.truncated), (1, 1, 0));
    let cut = read(LongRows::Truncate, 10).unwrap();
    assert_eq!((cut.examples.len(), cut.skipped, cut.truncated), (2, 0, 1));
    assert_eq!(shown(&cut.examples[1]), own("<123456789", "89"));
    let e = read(LongRows::Truncate, 8).unwrap_err().to_string();
    assert!(e.contains("line 2: no token to learn once cut to 8 tokens"), "{e}");
}

fn random(n: usize, longest: usize, rng: &mut Rng) -> Vec<Example> {
    let one = |i: usize| {
        let n = 2 + rng.below(longest - 1);
        let tokens = (0..n).map(|j| (1000 * i + j) as u32).collect();
        let loss = (0..n).map(|j| j > 0 && (j == 1 || j % 3 == 0)).collect();
        Example { tokens, loss }
    };
    (0..n).map(one).collect()
}

#[test]
fn an_epoch_holds_every_example_once_within_the_limits() {
    let mut rng = Rng::new(2);
    for case in 0..60 {
        let longest = 2 + rng.below(40);
        let examples = random(1 + rng.below(200), longest, &mut rng);
        let limits = Packing { rows: longest + rng.below(100), sequences: 1 + rng.below(9) };
        let mut batches = Batches::new(&examples, limits, Some(case), Cursor::default()).unwrap();
        let mut seen = Vec::new();
        for _ in 0..batches.in_epoch() {
            assert_eq!(batches.cursor().epoch, 0);
            let b = batches.next().unwrap();
            assert!(b.tokens.len() <= limits.rows && b.lens.len() <= limits.sequences);
            assert_eq!(b.lens.iter().sum::<usize>(), b.tokens.len());
            let (mut at, mut labels) = (0, Vec::new());
            for &len in &b.lens {
                let e = &examples[b.tokens[at] as usize / 1000];
                assert_eq!(e.tokens, b.tokens[at..at + len]);
                labels.extend((1..len).filter(|&i| e.loss[i]).map(|i| ((at + i - 1) as u32, e.tokens[i])));
                seen.push(e.tokens[0] / 1000);
                at += len;
            }
            assert_eq!(b.labels, labels);
        }
        assert_eq!(batches.cursor(), Cursor { epoch: 1, position: 0 });
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..examples.len() as u32));
    }
}

#[test]
fn hardly_a_row_is_lost() {
    let examples = random(3000, 100, &mut Rng::new(4));
    let rows = examples.iter().map(|e| e.tokens.len()).sum::<usize>();
    let limits = Packing { rows: 512, sequences: 64 };
    let n = Batches::new(&examples, limits, Some(1), Cursor::default()).unwrap().in_epoch();
    assert!(rows as f64 > 0.97 * (n * limits.rows) as f64, "{rows} rows in {n} batches of {}", limits.rows);
}

#[test]
fn from_any_cursor_the_run_goes_on_as_it_would_have() {
    let examples = random(50, 20, &mut Rng::new(9));
    let limits = Packing { rows: 64, sequences: 5 };
    let from = |cursor| Batches::new(&examples, limits, Some(7), cursor).unwrap();
    let (mut all, mut cursors, mut run) = (Vec::new(), Vec::new(), from(Cursor::default()));
    while run.cursor().epoch < 3 {
        cursors.push(run.cursor());
        all.push(run.next().unwrap());
    }
    for (i, cursor) in cursors.iter().enumerate() {
        let stored: Cursor = serde_json::from_str(&serde_json::to_string(cursor).unwrap()).unwrap();
        assert!(from(stored).take(all.len() - i).eq(all[i..].iter().cloned()), "from {cursor:?}");
    }
    let epoch = cursors.iter().position(|c| c.epoch == 1).unwrap();
    assert_ne!(all[0], all[epoch], "each epoch has its own order");
    assert_ne!(Batches::new(&examples, limits, Some(8), Cursor::default()).unwrap().next(), Some(all[0].clone()));
    let first = Batches::new(&examples, limits, None, Cursor::default()).unwrap().next().unwrap();
    assert_eq!(first.tokens[0], 0);

    let refused = |l: Packing, c: Cursor, e: &[Example]| Batches::new(e, l, Some(7), c).err().unwrap().to_string();
    let start = Cursor::default();
    assert!(refused(Packing { rows: 10, ..limits }, start, &examples).contains("--batch-tokens"));
    assert!(refused(limits, Cursor { epoch: 0, position: 999 }, &examples).contains("not the same data"));
    assert!(refused(limits, start, &[]).contains("nothing"));
}
