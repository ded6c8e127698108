//! What a line of data says.

use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result, bail, ensure};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// The content of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// `{"text"}`: every token is learnt.
    Text(String),
    /// `{"prompt", "completion"}`, of which the completion is learnt. So are `{"question", "answer"}` and `{"input", "label"}`,
    /// whose two parts stand on lines of their own.
    Pair {
        /// What comes before.
        prompt: String,
        /// What is learnt.
        completion: String,
    },
    /// `{"messages": [{"role", "content"}, ..]}`, of which the assistant's turns are learnt.
    Chat(Vec<Turn>),
}

/// One row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it holds.
    pub content: Content,
    /// The part of the data that it belongs to (`train`, `test`), where it says so.
    pub split: Option<String>,
}

/// The first line of a file of classifications, `{"task", "labels"}`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The task's name, where it has one.
    pub task: Option<String>,
    /// The texts among which each row's answer is; none where the rows have to tell.
    pub labels: Vec<String>,
}

impl Header {
    /// Reads the line that [`Record::parse`] took for no record.
    ///
    /// # Errors
    /// A label that is no text, without the place.
    pub fn parse(text: &str) -> Result<Self> {
        let line: Value = serde_json::from_str(text).unwrap_or_default();
        let mut header =
            Self { task: line["task"].as_str().filter(|t| !t.is_empty()).map(String::from), labels: Vec::new() };
        for label in line["labels"].as_array().into_iter().flatten() {
            let Value::String(label) = label else { bail!(Usage, "the label {label} is {}, not a text", kind(label)) };
            header.labels.push(label.clone());
        }
        Ok(header)
    }
}

/// Names of the two fields of a pair, and what lies between them.
const PAIRS: [(&str, &str, &str); 3] =
    [("prompt", "completion", ""), ("question", "answer", "\n"), ("input", "label", "\n")];

impl Record {
    /// Reads line `number` of a file. A first line that describes a task (`{"task", "labels", ..}`) is no record.
    ///
    /// # Errors
    /// What is wrong, without the place.
    pub fn parse(text: &str, number: usize) -> Result<Option<Self>> {
        let fields = object(text)?;
        let has = |key: &str| fields.contains_key(key);
        if number == 1 && has("task") && has("labels") && !has("input") {
            return Ok(None);
        }
        let mut forms = Vec::new();
        if has("text") {
            forms.push(("text".into(), Content::Text(string(&fields, "text")?)));
        }
        for (first, second, between) in PAIRS {
            if has(first) && has(second) {
                let (prompt, completion) = (string(&fields, first)?, string(&fields, second)?);
                let prompt = if prompt.ends_with('\n') { prompt } else { prompt + between };
                forms.push((format!("{first} and {second}"), Content::Pair { prompt, completion }));
            }
        }
        if has("messages") {
            forms.push(("messages".into(), Content::Chat(turns(&fields["messages"])?)));
        }
        let split = if has("split") { Some(string(&fields, "split")?) } else { None };
        if forms.len() > 1 {
            let names: Vec<String> = forms.into_iter().map(|f| f.0).collect();
            bail!(Usage, "ambiguous: the row has {}", names.join(", and also "));
        }
        let Some((_, content)) = forms.pop() else {
            let keys: Vec<&str> = fields.keys().map(String::as_str).collect();
            bail!(
                Usage,
                "expected \"text\", \"prompt\" with \"completion\", \"question\" with \"answer\", \"input\" with \
                 \"label\", or \"messages\"; the row has {keys:?}"
            );
        };
        Ok(Some(Self { content, split }))
    }
}

/// The fields of a line.
pub(super) fn object(text: &str) -> Result<Map<String, Value>> {
    let broken = |e: serde_json::Error| {
        // The error's own line is always 1.
        let e = e.to_string();
        let (what, column) = e.rsplit_once(" at line 1 column ").unwrap_or((&e, "1"));
        Error::new(ErrorKind::Usage, format!("not JSON: {what} at column {column}"))
    };
    match serde_json::from_str(text).map_err(broken)? {
        Value::Object(fields) => Ok(fields),
        _ => bail!(Usage, "expected a JSON object"),
    }
}

pub(super) fn string(fields: &Map<String, Value>, key: &str) -> Result<String> {
    match fields.get(key) {
        Some(Value::String(s)) => Ok(s.clone()),
        Some(other) => bail!(Usage, "{key:?} is {}, not a text", kind(other)),
        None => bail!(Usage, "{key:?} is missing"),
    }
}

fn turns(value: &Value) -> Result<Vec<Turn>> {
    let Value::Array(list) = value else { bail!(Usage, "\"messages\" is {}, not a list", kind(value)) };
    ensure!(!list.is_empty(), Usage, "\"messages\" is empty");
    let turn = |(i, v): (usize, &Value)| {
        let Value::Object(fields) = v else { bail!(Usage, "message {} is {}, not an object", i + 1, kind(v)) };
        let field = |key| string(fields, key).map_err(|e| e.at(format!("message {}", i + 1)));
        Ok(Turn { role: field("role")?, content: field("content")? })
    };
    list.iter().enumerate().map(turn).collect()
}

fn kind(v: &Value) -> &'static str {
    match v {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
