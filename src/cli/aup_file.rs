//! Files of operating points: families of tasks of methods, in YAML or JSON.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};

use crate::engine::Point;
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};

/// What stands beside the methods of a task.
const BEST: &str = "best";

/// The points of a method on a task.
pub(super) struct Method {
    pub name: String,
    /// At least one, each possible.
    pub points: Vec<Point>,
}

pub(super) struct Task {
    pub name: String,
    /// The best accuracy of any method, where a file says so; else that of all points here counts.
    pub given_best: Option<f64>,
    /// At least one.
    pub methods: Vec<Method>,
}

impl Task {
    /// The accuracy by which all are weighed, percent.
    pub fn best(&self) -> f64 {
        let all = self.methods.iter().flat_map(|m| &m.points).map(|p| p.accuracy);
        self.given_best.unwrap_or_else(|| all.fold(0.0, f64::max))
    }
}

/// Tasks that share a leaderboard.
pub(super) struct Family {
    /// Empty for tasks that stand outside of any.
    pub name: String,
    pub tasks: Vec<Task>,
}

/// All that `files` hold; what is of the same family and task comes together.
///
/// # Errors
/// `Io`; `Usage` for what is no such file, naming file and place; for a method or a best accuracy that two files give.
pub(super) fn read(files: &[impl AsRef<Path>]) -> Result<Vec<Family>> {
    let mut families = Vec::new();
    for file in files.iter().map(AsRef::as_ref) {
        let at = || file.display().to_string();
        parse(file).and_then(|top| add(&mut families, top)).context(at)?;
    }
    Ok(families)
}

fn parse(file: &Path) -> Result<Node> {
    let text = std::fs::read(file).map_err(|e| Error::io("not readable", e))?;
    let usage = |e: Box<dyn std::error::Error + Send + Sync>| Error::new(ErrorKind::Usage, e.to_string());
    // JSON is YAML but for escapes and tabs; its own reader knows them.
    match file.extension().is_some_and(|e| e.eq_ignore_ascii_case("json")) {
        true => serde_json::from_slice(&text).map_err(|e| usage(e.into())),
        false => yaml_serde::from_slice(&text).map_err(|e| usage(e.into())),
    }
}

fn add(families: &mut Vec<Family>, top: Node) -> Result<()> {
    let Node::Map(top) = top else { bail!(Usage, "expected TASK: {{METHOD: [[TPF, accuracy], ..]}}, found {top}") };
    ensure!(!top.is_empty(), Usage, "no tasks");
    for (name, node) in top {
        let place = name.clone();
        let added = match node {
            Node::Map(inner) if inner.iter().any(|(_, n)| matches!(n, Node::Map(_))) => {
                inner.into_iter().try_for_each(|(task, node)| {
                    let place = task.clone();
                    add_task(families, &name, task, node).context(|| place)
                })
            }
            node => add_task(families, "", name, node),
        };
        added.context(|| place)?;
    }
    Ok(())
}

fn add_task(families: &mut Vec<Family>, family: &str, name: String, node: Node) -> Result<()> {
    let Node::Map(entries) = node else { bail!(Usage, "expected METHOD: [[TPF, accuracy], ..], found {node}") };
    let (mut best, mut methods) = (None, Vec::new());
    for (key, node) in entries {
        if key == BEST {
            let Node::Number(x) = node else { bail!(Usage, "{BEST}: expected the task's best accuracy, found {node}") };
            ensure!((0.0..=100.0).contains(&x), Usage, "{BEST}: {x} is impossible: expected percent, 0 to 100");
            best = Some(x);
        } else {
            let points = points(node).context(|| key.clone())?;
            methods.push(Method { name: key, points });
        }
    }
    ensure!(!methods.is_empty(), Usage, "no methods");
    let at = families.iter().position(|f| f.name == family).unwrap_or_else(|| {
        families.push(Family { name: family.into(), tasks: Vec::new() });
        families.len() - 1
    });
    let tasks = &mut families[at].tasks;
    let Some(task) = tasks.iter_mut().find(|t| t.name == name) else {
        tasks.push(Task { name, given_best: best, methods });
        return Ok(());
    };
    if let (Some(a), Some(b)) = (task.given_best, best) {
        ensure!(a == b, Usage, "{BEST}: {b} here, {a} in an earlier file");
    }
    task.given_best = task.given_best.or(best);
    if let Some(m) = methods.iter().find(|m| task.methods.iter().any(|other| other.name == m.name)) {
        bail!(Usage, "{}: also in an earlier file", m.name);
    }
    task.methods.append(&mut methods);
    Ok(())
}

fn points(node: Node) -> Result<Vec<Point>> {
    let Node::List(list) = node else { bail!(Usage, "expected [[TPF, accuracy], ..], found {node}") };
    ensure!(!list.is_empty(), Usage, "no points");
    let point = |(i, node)| {
        let point = match node {
            Node::List(pair) => match pair[..] {
                [Node::Number(tpf), Node::Number(accuracy)] => Point { tpf, accuracy }.validate(),
                _ => Err(Error::new(ErrorKind::Usage, format!("expected [TPF, accuracy], found {}", Node::List(pair)))),
            },
            node => Err(Error::new(ErrorKind::Usage, format!("expected [TPF, accuracy], found {node}"))),
        };
        point.context(|| format!("point {}", i + 1))
    };
    list.into_iter().enumerate().map(point).collect()
}

/// What both formats have in common, in the order of the file. A key that comes twice is an error: with maps of the libraries one of its values
/// would be lost in silence.
enum Node {
    Number(f64),
    Text(String),
    /// true, false or null.
    Word(&'static str),
    List(Vec<Node>),
    Map(Vec<(String, Node)>),
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(x) => write!(f, "{x}"),
            Self::Text(text) => write!(f, "{text:?}"),
            Self::Word(word) => f.write_str(word),
            Self::List(list) => {
                let shown: Vec<String> = list.iter().take(3).map(ToString::to_string).collect();
                write!(f, "[{}{}]", shown.join(", "), if list.len() > 3 { ", .." } else { "" })
            }
            Self::Map(map) => match &map[..] {
                [] => f.write_str("{}"),
                [(key, _), ..] => write!(f, "{{{key}: ..}}"),
            },
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Any)
    }
}

struct Any;

impl<'de> Visitor<'de> for Any {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("maps, lists and numbers")
    }
    fn visit_f64<E>(self, x: f64) -> Result<Node, E> {
        Ok(Node::Number(x))
    }
    fn visit_i64<E>(self, x: i64) -> Result<Node, E> {
        Ok(Node::Number(x as f64))
    }
    fn visit_u64<E>(self, x: u64) -> Result<Node, E> {
        Ok(Node::Number(x as f64))
    }
    fn visit_str<E>(self, text: &str) -> Result<Node, E> {
        Ok(Node::Text(text.into()))
    }
    fn visit_bool<E>(self, yes: bool) -> Result<Node, E> {
        Ok(Node::Word(if yes { "true" } else { "false" }))
    }
    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Word("null"))
    }
    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Word("null"))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(node) = from.next_element()? {
            list.push(node);
        }
        Ok(Node::List(list))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Node, A::Error> {
        let mut map = Vec::<(String, Node)>::new();
        while let Some(key) = from.next_key::<String>()? {
            if map.iter().any(|(k, _)| *k == key) {
                return Err(serde::de::Error::custom(format!("{key} comes twice")));
            }
            map.push((key, from.next_value()?));
        }
        Ok(Node::Map(map))
    }
}
