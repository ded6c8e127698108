//! The contract of the kernels (kernels/args/*.h): one line for each field, read into Rust structs with checks and into the
//! check at kernel entry under emulation. kernels/rt/contract.cuh states the grammar.

use std::fmt::Write;
use std::path::Path;

/// A struct of arguments, or a plain record that spans may hold.
pub struct Struct {
    name: String,
    doc: String,
    record: bool,
    fields: Vec<Field>,
}

struct Field {
    name: String,
    doc: String,
    /// `u32`, or the element of a span.
    ty: String,
    kind: Kind,
}

enum Kind {
    Scalar { rules: Vec<Rule> },
    Span { access: Access, extent: Vec<Vec<Factor>>, align: usize },
}

#[derive(Clone, Copy, PartialEq)]
enum Access {
    In,
    Out,
    InOut,
}

/// One factor of an extent: a product of terms, each a name or a literal, divided by a literal rounding up.
struct Factor {
    term: String,
    plus: u64,
    divide: u64,
}

/// `value % modulus == 0`, or a comparison with a literal.
struct Rule {
    op: String,
    value: String,
}

/// All structs of the headers in `dir`, file by file.
pub fn read(dir: &Path) -> Result<Vec<Struct>, String> {
    let mut all = Vec::new();
    for path in super::with_extension(dir, "h") {
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        parse(&text, &mut all).map_err(|(line, why)| format!("{}:{line}: {why}", path.display()))?;
    }
    // Records first: spans hold them.
    all.sort_by_key(|s| !s.record);
    Ok(all)
}

fn parse(text: &str, all: &mut Vec<Struct>) -> Result<(), (usize, String)> {
    let mut doc = String::new();
    let mut open: Option<Struct> = None;
    for (i, line) in text.lines().enumerate() {
        let fail = |why: &str| (i + 1, format!("{why}: {line}"));
        let line = line.trim();
        if let Some(s) = &mut open {
            if line == "};" {
                all.extend(open.take());
            } else if !line.is_empty() && !line.starts_with("//") {
                s.fields.push(field(line, s.record).map_err(|e| fail(&e))?);
            }
            continue;
        }
        if let Some(text) = line.strip_prefix("//") {
            doc += text;
            doc.push('\n');
            continue;
        }
        for (head, record) in [("ARGS(", false), ("RECORD(", true)] {
            if let Some(rest) = line.strip_prefix(head) {
                let name = rest.strip_suffix(") {").ok_or_else(|| fail("a struct begins with NAME(X) {"))?;
                open = Some(Struct { name: name.into(), doc: std::mem::take(&mut doc), record, fields: vec![] });
            }
        }
        doc.clear();
    }
    open.map_or(Ok(()), |s| Err((text.lines().count(), format!("{} is not closed", s.name))))
}

/// In a record every comment is prose.
fn field(line: &str, record: bool) -> Result<Field, String> {
    let (code, comment) = line.split_once("//").unwrap_or((line, ""));
    let code = code.trim().strip_suffix(';').ok_or("a field ends in ;")?;
    let (ty, name) = code.rsplit_once(' ').ok_or("a field is TYPE NAME;")?;
    let (contract, prose) = if record { ("", comment) } else { comment.split_once(" - ").unwrap_or((comment, "")) };
    let contract = contract.trim();
    let spans = [("In<", Access::In), ("Out<", Access::Out), ("InOut<", Access::InOut)];
    let span = spans.iter().find_map(|(open, access)| Some((ty.strip_prefix(open)?.strip_suffix('>')?, *access)));
    let (ty, kind) = match span {
        Some((element, access)) => {
            let (inside, rest) = contract
                .strip_prefix('[')
                .and_then(|c| c.split_once(']'))
                .ok_or("a span has its extent, // [rows, d]")?;
            let align = match rest.trim().strip_prefix("align ") {
                Some(n) => n.trim().parse().map_err(|_| "align N")?,
                None => 1,
            };
            let extent = inside.split(',').map(|f| f.split('*').map(factor).collect()).collect::<Result<_, _>>()?;
            (element, Kind::Span { access, extent, align })
        }
        None => {
            let rules =
                contract.split(',').map(str::trim).filter(|r| !r.is_empty()).map(rule).collect::<Result<_, _>>()?;
            (ty, Kind::Scalar { rules })
        }
    };
    Ok(Field { name: name.trim().into(), doc: format!("{contract} {}", prose.trim()), ty: ty.into(), kind })
}

/// `d`, `16`, `d / 32`, `(rows + 63) / 64`.
fn factor(text: &str) -> Result<Factor, String> {
    let (top, divide) = match text.split_once('/') {
        Some((top, by)) => (top, by.trim().parse().map_err(|_| "division by a literal only")?),
        None => (text, 1),
    };
    let top = top.trim().trim_start_matches('(').trim_end_matches(')');
    let (term, plus) = match top.split_once('+') {
        Some((term, by)) => (term, by.trim().parse().map_err(|_| "addition of a literal only")?),
        None => (top, 0),
    };
    Ok(Factor { term: term.trim().into(), plus, divide })
}

fn rule(text: &str) -> Result<Rule, String> {
    if let Some(by) = text.strip_prefix('%') {
        let modulus = by.trim().strip_suffix("== 0").ok_or("a rule is % N == 0")?;
        return Ok(Rule { op: "%".into(), value: modulus.trim().into() });
    }
    let (op, value) = text.split_once(' ').ok_or("a rule is >= N, > N, <= N or < N")?;
    if ![">=", ">", "<=", "<"].contains(&op) || value.trim().parse::<f64>().is_err() {
        return Err(format!("no rule: {text}"));
    }
    Ok(Rule { op: op.into(), value: value.trim().into() })
}

fn rust_type(ty: &str) -> &str {
    match ty {
        "float" => "f32",
        "double" => "f64",
        "bf16_t" => "half::bf16",
        "f16_t" => "half::f16",
        "uint8_t" => "u8",
        "int8_t" => "i8",
        other => other,
    }
}

/// Number of elements, as an expression in u64; `name` turns a scalar's name into one.
fn extent(factors: &[Vec<Factor>], name: impl Fn(&str) -> String) -> String {
    let terms: Vec<_> = factors
        .iter()
        .flatten()
        .map(|f| {
            let term = if f.term.parse::<u64>().is_ok() { f.term.clone() } else { name(&f.term) };
            match (f.plus, f.divide) {
                (0, 1) => term,
                (plus, divide) => format!("(({term} + {plus}) / {divide})"),
            }
        })
        .collect();
    terms.join(" * ")
}

/// The structs, with constructors that check every rule and borrow every span.
pub fn to_rust(structs: &[Struct]) -> String {
    let mut out = String::new();
    for s in structs {
        for line in s.doc.lines() {
            let _ = writeln!(out, "/// {}", line.trim().replace('[', "\\[").replace(']', "\\]"));
        }
        let derive = if s.record { "Debug, Default, bytemuck::Pod, bytemuck::Zeroable, " } else { "" };
        let align = if s.record { ", align(8)" } else { "" };
        let _ = writeln!(out, "#[repr(C{align})]\n#[derive({derive}Clone, Copy)]\npub struct {} {{", s.name);
        for f in &s.fields {
            let visible = if s.record { "pub " } else { "" };
            let ty = if matches!(f.kind, Kind::Span { .. }) { "u64" } else { rust_type(&f.ty) };
            let doc = f.doc.trim().replace('[', "\\[").replace(']', "\\]");
            let _ = writeln!(
                out,
                "    /// {}\n    {visible}{}: {ty},",
                if doc.is_empty() { &f.name } else { &doc },
                f.name
            );
        }
        out += "}\n";
        if s.record {
            let _ = writeln!(out, "impl crate::dtype::Elem for {} {{ const NAME: &'static str = \"{0}\"; }}", s.name);
            continue;
        }
        constructor(&mut out, s);
        arguments(&mut out, s);
    }
    out
}

/// How the struct is handed over: field by field into zeros, so that what lies between fields is the same for equal arguments.
fn arguments(out: &mut String, s: &Struct) {
    let _ = writeln!(out, "impl super::Args for {} {{\n    fn put(&self, out: &mut Vec<u64>) {{", s.name);
    *out += "        let at = out.len();\n        out.resize(at + size_of::<Self>().div_ceil(8), 0);\n";
    *out += "        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut out[at..]);\n";
    for f in &s.fields {
        let _ = writeln!(
            out,
            "        let v = self.{0}.to_ne_bytes();\n        bytes[std::mem::offset_of!(Self, {0})..][..v.len()].copy_from_slice(&v);",
            f.name
        );
    }
    *out += "    }\n}\n";
}

fn constructor(out: &mut String, s: &Struct) {
    let _ = writeln!(
        out,
        "impl {} {{\n    /// Checks the contract.\n    #[allow(clippy::too_many_arguments)]\n    pub fn new(",
        s.name
    );
    for f in &s.fields {
        let ty = rust_type(&f.ty);
        let _ = match &f.kind {
            Kind::Span { access: Access::In, .. } => writeln!(out, "        {}: super::Src<'_, {ty}>,", f.name),
            Kind::Span { .. } => writeln!(out, "        {}: super::Dst<'_, {ty}>,", f.name),
            Kind::Scalar { .. } => writeln!(out, "        {}: {ty},", f.name),
        };
    }
    out.push_str("    ) -> crate::error::Result<Self> {\n");
    for f in &s.fields {
        match &f.kind {
            Kind::Scalar { rules } => {
                for r in rules {
                    let n = &f.name;
                    let test = if r.op == "%" {
                        format!("{n} % {} == 0", r.value)
                    } else if f.ty == "float" {
                        format!("{n} {} {}f32", r.op, r.value)
                    } else if f.ty == "double" {
                        format!("{n} {} {}f64", r.op, r.value)
                    } else {
                        format!("{n} {} {}", r.op, r.value)
                    };
                    let _ = writeln!(
                        out,
                        "        if !({test}) {{ return super::broken(\"{}\", \"{n}\", format_args!(\"{} {}\"), {n}); }}",
                        s.name,
                        if r.op == "%" { "a multiple of" } else { &r.op },
                        r.value
                    );
                }
            }
            Kind::Span { extent: e, align, .. } => {
                let len = extent(e, |n| format!("u64::from({n})"));
                let (at, n) = (&s.name, &f.name);
                let _ =
                    writeln!(out, "        super::span(\"{at}\", \"{n}\", {n}.address(), {n}.len(), {len}, {align})?;");
            }
        }
    }
    out.push_str("        Ok(Self {");
    for f in &s.fields {
        let _ = match f.kind {
            Kind::Span { .. } => write!(out, " {0}: {0}.address(),", f.name),
            Kind::Scalar { .. } => write!(out, " {},", f.name),
        };
    }
    out.push_str(" })\n    }\n}\n");
}

/// The same checks at kernel entry, for the emulator, which knows what memory is live.
pub fn to_cpp(structs: &[Struct]) -> String {
    let mut out = String::from("// Generated from kernels/args by build.rs.\n#pragma once\n");
    out += "extern \"C\" bool emu_extent(const void*, size_t) __attribute__((weak));\n";
    out += "[[noreturn]] inline void emu_broken(const char* kernel, const char* what) { emu_fail(what, kernel, 0); }\n";
    for s in structs.iter().filter(|s| !s.record) {
        let _ = writeln!(
            out,
            "inline void emu_check(const {}& a, const char* kernel) {{\n  (void)a; (void)kernel;",
            s.name
        );
        for f in &s.fields {
            let n = &f.name;
            match &f.kind {
                Kind::Scalar { rules } => {
                    for r in rules {
                        let (test, text) = if r.op == "%" {
                            (format!("a.{n} % {} == 0", r.value), format!("{n} % {} == 0", r.value))
                        } else {
                            (format!("a.{n} {} {}", r.op, r.value), format!("{n} {} {}", r.op, r.value))
                        };
                        let _ = writeln!(out, "  if (!({test})) emu_broken(kernel, \"{}: not {text}\");", s.name);
                    }
                }
                Kind::Span { extent: e, align, .. } => {
                    let len = extent(e, |n| format!("uint64_t(a.{n})"));
                    let _ = writeln!(
                        out,
                        "  if (uintptr_t(a.{n}.p) % {align}) emu_broken(kernel, \"{}: {n} is not aligned to {align}\");",
                        s.name
                    );
                    let _ = writeln!(
                        out,
                        "  if (emu_extent && ({len}) && !emu_extent(a.{n}.p, ({len}) * sizeof(*a.{n}.p))) emu_broken(kernel, \"{}: {n} is shorter than its contract\");",
                        s.name
                    );
                }
            }
        }
        out += "}\n";
    }
    out
}
