//! Chat templates: messages to the prompt text that a model was trained on.
//!
//! A template is a Jinja program that came with a model, so it runs on a budget: instructions, intermediate strings and
//! output all cost fuel, and recursion is bounded. It has no access to files or the network.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, ErrorKind as JinjaKind, Value as Jinja, context};
use serde::Serialize;
use serde_json::Value;

use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::format::gguf::Gguf;
use crate::format::mmap::read_text;

/// Upper bound of a template's source.
const MAX_SOURCE: usize = 1 << 20;
/// Upper bound of a `tokenizer_config.json`; those with thousands of added tokens have a few MB.
const MAX_CONFIG: u64 = 64 << 20;
/// Instructions, or 64 bytes of data each: far above what any real template takes for a page of chat.
const FUEL: u64 = 1_000_000;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    fn value(&self) -> Jinja {
        context! { role => self.role.as_str(), content => self.content.as_str() }
    }
}

/// A compiled template and the names of the tokens that it may write.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    name: String,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles `source`; errors call it `name`. `bos` and `eos` are the texts of those tokens, empty if there are none.
    pub fn new(name: &str, source: &str, bos: &str, eos: &str) -> Result<Self> {
        ensure!(source.len() <= MAX_SOURCE, Tokenizer, "chat template {name}: {} bytes of source", source.len());
        let mut env = Environment::new();
        let failed = |e| jinja_error(name, &e);
        // As in the reference implementation, whose templates count on it.
        env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failed)?);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.set_recursion_limit(64);
        env.add_function("raise_exception", |text: String| -> std::result::Result<Jinja, minijinja::Error> {
            Err(minijinja::Error::new(JinjaKind::InvalidOperation, text))
        });
        env.add_function("strftime_now", strftime_now);
        env.add_filter("tojson", to_json);
        env.add_template_owned("chat", source.to_owned()).map_err(failed)?;
        Ok(Self { env, name: name.into(), bos: bos.into(), eos: eos.into() })
    }

    /// The template in a GGUF file's metadata, if there is one.
    pub fn from_gguf(file: &Gguf, name: &str) -> Result<Option<Self>> {
        let Some(source) = file.str("tokenizer.chat_template")? else { return Ok(None) };
        let token = |key: &str| -> Result<String> {
            let (id, tokens) = (file.token(key)?, file.strings("tokenizer.ggml.tokens")?);
            let text = id.zip(tokens).and_then(|(id, mut tokens)| tokens.nth(id as usize));
            Ok(text.transpose()?.unwrap_or_default().to_owned())
        };
        let (bos, eos) = (token("tokenizer.ggml.bos_token_id")?, token("tokenizer.ggml.eos_token_id")?);
        Self::new(name, source, &bos, &eos).map(Some)
    }

    /// The template of a Hugging Face folder, from `chat_template.jinja` or else `tokenizer_config.json`.
    pub fn from_folder(folder: &Path) -> Result<Option<Self>> {
        let (config, jinja) = (folder.join("tokenizer_config.json"), folder.join("chat_template.jinja"));
        let fields = if config.is_file() { read_text(&config, MAX_CONFIG)? } else { "{}".into() };
        let source = if jinja.is_file() { Some(read_text(&jinja, MAX_SOURCE as u64)?) } else { None };
        let name = if source.is_some() { jinja } else { config.clone() };
        Self::from_config(&name.display().to_string(), &fields, source).context(|| config.display().to_string())
    }

    /// The template in the text of a `tokenizer_config.json`, or `source` where that is given; its token names come from the
    /// config either way.
    pub fn from_config(name: &str, config: &str, source: Option<String>) -> Result<Option<Self>> {
        let fields: Value = serde_json::from_str(config)
            .map_err(|e| Error::with_source(ErrorKind::Tokenizer, "not a tokenizer configuration", e))?;
        let text = |v: &Value| v.as_str().or_else(|| v["content"].as_str()).unwrap_or("").to_owned();
        let (bos, eos) = (text(&fields["bos_token"]), text(&fields["eos_token"]));
        if let Some(source) = source {
            return Self::new(name, &source, &bos, &eos).map(Some);
        }
        match &fields["chat_template"] {
            Value::Null => Ok(None),
            Value::String(source) => Self::new(name, source, &bos, &eos).map(Some),
            Value::Array(list) => match list.iter().find(|t| t["name"] == "default").map(|t| &t["template"]) {
                Some(Value::String(source)) => Self::new(name, source, &bos, &eos).map(Some),
                _ => bail!(Tokenizer, "chat_template is a list without one named \"default\""),
            },
            _ => bail!(Tokenizer, "chat_template is neither a text nor a list of named texts"),
        }
    }

    /// The prompt for `messages`; with `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// The text carries its own special tokens (bos as well, if the template writes it): encode it with `parse_special`, and
    /// without `add_special` if it starts with the bos token already.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let size: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        let mut env = self.env.clone();
        // A long conversation may be copied a few dozen times.
        env.set_fuel(Some(FUEL + size as u64));
        let context = context! {
            messages => messages.iter().map(Message::value).collect::<Vec<_>>(),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        let rendered = env.get_template("chat").and_then(|t| t.render(context));
        rendered.map_err(|e| jinja_error(&self.name, &e))
    }

    /// The text of the bos token, as templates see it.
    pub fn bos(&self) -> &str {
        &self.bos
    }
}

fn jinja_error(name: &str, e: &minijinja::Error) -> Error {
    let line = e.line().map(|l| format!(", line {l}")).unwrap_or_default();
    let detail = e.detail().map(|d| format!(": {d}")).unwrap_or_default();
    Error::new(ErrorKind::Tokenizer, format!("chat template {name}{line}: {}{detail}", e.kind()))
}

/// JSON as Python writes it, which the models saw in training: `{"a": [1, 2]}`, nothing escaped for HTML.
fn to_json(value: Jinja, indent: Option<usize>, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let failed = |e: serde_json::Error| minijinja::Error::new(JinjaKind::BadSerialization, e.to_string());
    let indent = match indent {
        Some(n) => Some(n),
        None => options.get::<Option<usize>>("indent")?,
    };
    let mut out = Vec::new();
    match indent {
        Some(n) => {
            let spaces = " ".repeat(n.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty)).map_err(failed)?;
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)).map_err(failed)?,
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// One line with a space behind commas and colons.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

/// The present date and time, UTC, in the parts of `strftime` that templates use.
fn strftime_now(format: String) -> std::result::Result<String, minijinja::Error> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    strftime(&format, seconds)
        .map_err(|c| minijinja::Error::new(JinjaKind::InvalidOperation, format!("strftime_now: %{c} is not handled")))
}

/// `seconds` since 1970 by `format`; the character behind an unknown `%` as error.
fn strftime(format: &str, seconds: u64) -> std::result::Result<String, char> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days in years that begin in March, so that the leap day comes last.
    let day = days + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let march = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * march + 2) / 5 + 1, (march + 2) % 12);
    let year = era * 400 + year + u64::from(month < 2);

    let (month_name, day_name) = (MONTHS[month as usize], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        out += &match chars.next().unwrap_or('%') {
            'Y' => year.to_string(),
            'm' => format!("{:02}", month + 1),
            'd' => format!("{day:02}"),
            'B' => month_name.into(),
            'b' => month_name[..3].into(),
            'A' => day_name.into(),
            'a' => day_name[..3].into(),
            'H' => format!("{:02}", second / 3600),
            'M' => format!("{:02}", second / 60 % 60),
            'S' => format!("{:02}", second % 60),
            '%' => "%".into(),
            other => return Err(other),
        };
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let at = |s| strftime("%A %d %b %Y %H:%M:%S %m %B %a %%", s).unwrap();
        assert_eq!(at(0), "Thursday 01 Jan 1970 00:00:00 01 January Thu %");
        assert_eq!(at(951_782_399), "Monday 28 Feb 2000 23:59:59 02 February Mon %");
        assert_eq!(at(951_782_400), "Tuesday 29 Feb 2000 00:00:00 02 February Tue %");
        assert_eq!(at(1_798_761_599), "Thursday 31 Dec 2026 23:59:59 12 December Thu %");
        assert_eq!(strftime("%q", 0), Err('q'));
    }

    #[test]
    fn a_template_sees_what_python_gives_it() {
        let render = |source: &str| {
            let t = ChatTemplate::new("t", source, "<s>", "</s>")?;
            t.render(&[Message::new("user", " <é & \"x\"> ")], true)
        };
        let source = "{{ bos_token }}{%- for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m['content'].strip() }}]\n  {% endif %}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}";
        assert_eq!(render(source).unwrap(), "<s>[<é & \"x\">]\n>");
        assert_eq!(render("{{ messages | tojson }}").unwrap(), r#"[{"role": "user", "content": " <é & \"x\"> "}]"#);
        assert!(render("{{ strftime_now('%Y') }}").unwrap().starts_with("20"));
        let e = render("{{ bos_token }}\n{{ raise_exception('roles must alternate') }}").unwrap_err().to_string();
        assert!(e.starts_with("chat template t, line 2: ") && e.contains("roles must alternate"), "{e}");
    }

    #[test]
    fn hostile_templates_run_out_of_fuel() {
        let hostile = [
            "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
            "{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
            "{{ 'x' * 10000000000 }}",
            "{{ 'x' | indent(100000000000, true) }}",
            "{{ '%100000000000d' | format(1) }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ [1] | slice(100000000000) | list }}",
            "{% include 'chat' %}",
        ];
        for source in hostile {
            let t = ChatTemplate::new("t", source, "", "").unwrap();
            assert!(t.render(&[], true).is_err(), "{source}");
        }
    }
}
