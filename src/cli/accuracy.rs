//! `quadriga eval accuracy`.

use std::path::Path;
use std::time::Instant;

use serde_json::json;

use super::flags::{AccuracyArgs, AccuracyBy, Common};
use super::out;
use crate::engine::{Accuracy, Generate, LabelTask, Message, label_accuracy};
use crate::error::{Error, ErrorKind, Result, bail, ensure};
use crate::train::data::{Content, Header, Record, for_each_line};

/// A file's tasks: prompt and right answer, and the labels that its first line lists.
struct Tasks {
    rows: Vec<(String, String)>,
    labels: Vec<String>,
}

fn read(path: &Path, args: &AccuracyArgs) -> Result<Tasks> {
    let mut tasks = Tasks { rows: Vec::new(), labels: Vec::new() };
    for_each_line(path, |number, text| {
        let usage =
            |e: Error| Error::new(ErrorKind::Usage, e.to_string()).at(format!("{}, line {number}", path.display()));
        let Some(record) = Record::parse(text, number).map_err(usage)? else {
            tasks.labels = Header::parse(text).map_err(usage)?.labels;
            return Ok(());
        };
        if record.split.is_some_and(|s| s != args.split) || (args.limit > 0 && tasks.rows.len() >= args.limit) {
            return Ok(());
        }
        let Content::Pair { prompt, completion } = record.content else {
            return Err(usage(Error::new(ErrorKind::Usage, "a task is a prompt with an answer")));
        };
        tasks.rows.push((prompt, completion));
        Ok(())
    })?;
    ensure!(!tasks.rows.is_empty(), Usage, "{}: no task in split {:?}", path.display(), args.split);
    if tasks.labels.is_empty() {
        tasks.labels = tasks.rows.iter().map(|r| r.1.clone()).collect();
        tasks.labels.sort();
        tasks.labels.dedup();
    }
    Ok(tasks)
}

pub(super) fn run(common: &Common, args: &AccuracyArgs) -> Result<()> {
    let tasks = read(&args.file, args)?;
    let (bar, start) = (out::bar(tasks.rows.len() as u64, "tasks"), Instant::now());
    let (result, labels) = match args.by {
        AccuracyBy::Label => (by_label(common, args, &tasks, &|| bar.inc(1))?, &tasks.labels[..]),
        AccuracyBy::Generate => (by_answer(common, args, &tasks, &|| bar.inc(1))?, &[][..]),
    };
    bar.finish_and_clear();
    let Accuracy { tasks: n, right, labels: counts } = &result;
    let (share, seconds) = (*right as f64 / *n as f64, start.elapsed().as_secs_f64());
    if common.json {
        let counts: Vec<_> = labels
            .iter()
            .zip(counts)
            .map(|(l, [is, chosen])| json!({"label": l, "rows": is, "chosen": chosen}))
            .collect();
        return out::print_json(&json!({
            "model": common.model, "adapter": common.adapter, "file": args.file, "tasks": n, "right": right,
            "accuracy": out::round(share, 4), "labels": counts, "seconds": out::round(seconds, 3),
        }));
    }
    out::print(&format!("accuracy {:.1} % ({right} of {n})\n", 100.0 * share))?;
    for (label, [is, chosen]) in labels.iter().zip(counts) {
        out::print(&format!("  {label}: {is} rows, chosen {chosen} times\n"))?;
    }
    Ok(())
}

fn by_label(common: &Common, args: &AccuracyArgs, tasks: &Tasks, done: &dyn Fn()) -> Result<Accuracy> {
    const MOST: usize = 256;
    let labels = &tasks.labels;
    let file = args.file.display();
    ensure!((2..=MOST).contains(&labels.len()), Usage, "{file}: {} labels; --by generate compares texts", labels.len());
    ensure!(!args.chat, Usage, "--chat is for --by generate");
    let mut rows = Vec::with_capacity(tasks.rows.len());
    for (prompt, answer) in &tasks.rows {
        let Some(label) = labels.iter().position(|l| l == answer) else {
            bail!(Usage, "{file}: the label {answer:?} is not among {labels:?}");
        };
        rows.push(LabelTask { prompt: prompt.clone(), label });
    }
    label_accuracy(&common.path()?, common.adapter.as_deref(), &rows, labels, common.options()?, &mut || done())
}

/// What an answer comes down to: what stands behind its last ####, or all of it.
pub(super) fn essence(answer: &str) -> String {
    let last = answer.rsplit_once("####").map_or(answer, |(_, a)| a.lines().next().unwrap_or(a));
    last.trim().trim_end_matches('.').replace(',', "")
}

fn by_answer(common: &Common, args: &AccuracyArgs, tasks: &Tasks, done: &dyn Fn()) -> Result<Accuracy> {
    let engine = common.autoregressive()?;
    let mut out = Accuracy::default();
    for (prompt, answer) in &tasks.rows {
        let mut session = engine.session(engine.config().context, common.seed)?;
        if args.chat {
            session.push_chat(&[Message::new("user", prompt.trim_end())])?;
        } else {
            session.push_text(prompt)?;
        }
        let room = session.capacity().saturating_sub(session.tokens().len());
        let mut text = String::new();
        for piece in session.generate(Generate::default().max_tokens(args.max_tokens.min(room)))? {
            text.push_str(&piece?.text);
        }
        out.tasks += 1;
        out.right += usize::from(essence(&text) == essence(answer));
        done();
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::essence;

    #[test]
    fn answers_are_compared_by_what_they_come_down_to() {
        assert_eq!(essence("12 * 100 = 1,200.\n#### 1,200"), "1200");
        assert_eq!(essence("#### 5\n#### 7 \nAnd so on."), "7");
        assert_eq!(essence(" Good.\n"), "Good");
        assert_ne!(essence("Good"), essence("Bad"));
    }
}
