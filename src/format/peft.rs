//! LoRA adapters in the folders of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! An adapter adds `scale * B A x` to the output of a projection. Rows of q and k are in the half-and-half rotary order in
//! these files as in the decoder, whatever format the base model's weights came in.

use std::collections::HashSet;
use std::path::Path;

use regex::Regex;
use serde_json::{Map, Value, json};

use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::files::{TensorBytes, find_folder, write_folder, write_tensors};
use crate::format::diffusion_config;
use crate::format::mmap::{Mapping, read_text};
use crate::format::roles::slot;
use crate::format::safetensors::Shards;
use crate::format::{StoredType, TensorEntry};
use crate::model::config::{Diffusion, ModelConfig};
use crate::model::roles::{LayerRole, Role};
use crate::tensor::HostTensor;

const CONFIG: &str = "adapter_config.json";
const DIFFUSION: &str = "diffusion.json";
const TENSORS: &str = "adapter_model.safetensors";
/// Upper bound of a configuration; patterns name at most every projection.
const MAX_CONFIG: u64 = 16 << 20;

/// One adapter, in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftAdapter {
    /// The rank of most projections.
    pub rank: usize,
    /// The alpha of most projections.
    pub alpha: f32,
    /// Scales by alpha / sqrt(rank) instead of alpha / rank.
    pub rank_stabilized: bool,
    /// What the adapter was trained on, as the file calls it.
    pub base_model: Option<String>,
    /// Of an adapter that makes a diffusion model of its base: what that needs to know. In a file of its own, `diffusion.json`.
    pub diffusion: Option<Diffusion>,
    /// The matrices, layer by layer, each projection at most once.
    pub tensors: Vec<PeftTensor>,
}

/// The two factors for one projection.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftTensor {
    /// The layer, from 0.
    pub layer: usize,
    /// The projection, one of [`LayerRole::LINEARS`].
    pub module: LayerRole,
    /// Its rank.
    pub rank: usize,
    /// Its alpha.
    pub alpha: f32,
    /// `A`, `[rank, in]`, row-major.
    pub a: Vec<f32>,
    /// `B`, `[out, rank]`, row-major.
    pub b: Vec<f32>,
}

/// What a configuration says about the mathematics.
struct Settings {
    rank: usize,
    alpha: f32,
    rank_stabilized: bool,
    base_model: Option<String>,
    targets: Targets,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f32)>,
}

enum Targets {
    AllLinear,
    Names(Vec<String>),
    Pattern(Regex),
}

impl Targets {
    fn contain(&self, path: &str) -> bool {
        match self {
            Targets::AllLinear => true,
            Targets::Names(names) => {
                names.iter().any(|n| path.strip_suffix(n.as_str()).is_some_and(|p| p.is_empty() || p.ends_with('.')))
            }
            Targets::Pattern(p) => p.is_match(path),
        }
    }
}

/// A projection and its path in the model, such as `model.layers.0.self_attn.q_proj`.
struct Module {
    layer: usize,
    role: LayerRole,
    path: String,
    /// `[out, in]`.
    shape: [usize; 2],
}

fn modules(c: &ModelConfig) -> impl Iterator<Item = Module> {
    let places = (0..c.layers).flat_map(|layer| LayerRole::LINEARS.map(|role| (layer, role)));
    places.filter_map(|(layer, role)| {
        let slot = slot(c, Role::Layer(layer, role))?;
        let path = slot.hf.strip_suffix(".weight")?.to_owned();
        Some(Module { layer, role, path, shape: slot.shape.try_into().ok()? })
    })
}

impl Module {
    fn names(&self) -> [String; 2] {
        ["A", "B"].map(|m| format!("base_model.model.{}.lora_{m}.weight", self.path))
    }
}

/// What A and B of a projection are called, if a model of configuration `c` has it.
pub fn tensor_names(c: &ModelConfig, layer: usize, role: LayerRole) -> Option<[String; 2]> {
    modules(c).find(|m| (m.layer, m.role) == (layer, role)).map(|m| m.names())
}

impl PeftAdapter {
    /// The factor on `B A x`.
    pub fn scale(&self, t: &PeftTensor) -> f32 {
        let rank = t.rank as f32;
        t.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }

    /// Reads a folder as an adapter of a model of configuration `c`. Matrices in F32, F16 or BF16.
    ///
    /// # Errors
    /// `Unsupported` for a setting that changes the mathematics in a way the engine does not, by its key; `Config` and
    /// `Weights` for whatever is missing, damaged or does not fit the model, by key or tensor.
    pub fn read(folder: &Path, c: &ModelConfig) -> Result<Self> {
        let folder = find_folder(folder);
        let path = folder.join(CONFIG);
        let settings = read_text(&path, MAX_CONFIG)?;
        let settings = Settings::parse(&settings).context(|| path.display().to_string())?;
        let path = folder.join(TENSORS);
        ensure!(path.is_file(), Weights, "{}: missing; adapters are read from safetensors only", path.display());
        let file = Shards::parse(vec![(TENSORS.into(), Mapping::open(&path)?)]);
        let mut adapter = file.and_then(|f| settings.load(&f, c)).context(|| folder.display().to_string())?;
        let path = folder.join(DIFFUSION);
        if path.is_file() {
            let text = read_text(&path, MAX_CONFIG)?;
            adapter.diffusion = Some(diffusion_config::parse(&text, c).context(|| path.display().to_string())?);
        }
        Ok(adapter)
    }

    /// Writes a folder that [`PeftAdapter::read`] and PEFT read, in F32; whole or not at all.
    ///
    /// # Errors
    /// `Shape` for matrices that do not fit the model; files that cannot be written, by name.
    pub fn write(&self, folder: &Path, c: &ModelConfig) -> Result<()> {
        let all: Vec<Module> = modules(c).collect();
        let mut used: Vec<(&Module, &PeftTensor)> = Vec::new();
        for t in &self.tensors {
            let module = all.iter().find(|m| (m.layer, m.role) == (t.layer, t.module));
            let Some(module) = module else { bail!(Shape, "the model has no layer {} {}", t.layer, t.module) };
            let [out, inner] = module.shape;
            let fits = t.rank > 0 && t.a.len() == t.rank * inner && t.b.len() == out * t.rank;
            ensure!(fits, Shape, "{}: A or B is not of rank {} for [{out}, {inner}]", module.path, t.rank);
            let once = used.iter().all(|(m, _)| m.path != module.path);
            ensure!(once, Shape, "{} is given twice", module.path);
            used.push((module, t));
        }
        ensure!(!used.is_empty(), Shape, "the adapter has no matrices");
        used.sort_by_key(|(m, _)| (m.layer, LayerRole::LINEARS.iter().position(|r| *r == m.role)));

        let (mut ranks, mut alphas) = (Map::new(), Map::new());
        for (m, t) in &used {
            if t.rank != self.rank {
                ranks.insert(m.path.clone(), t.rank.into());
            }
            if t.alpha != self.alpha {
                alphas.insert(m.path.clone(), number(t.alpha));
            }
        }
        // The short names say it all if each projection is adapted in every layer or in none.
        let adapted = |role| used.iter().filter(|(m, _)| m.role == role).count();
        let short = LayerRole::LINEARS.iter().all(|r| [0, c.layers].contains(&adapted(*r)));
        let mut targets: Vec<&str> = Vec::new();
        for (m, _) in &used {
            let name = if short { m.path.rsplit('.').next().unwrap_or(&m.path) } else { &m.path };
            if !targets.contains(&name) {
                targets.push(name);
            }
        }
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "inference_mode": true,
            "r": self.rank,
            "lora_alpha": number(self.alpha),
            "lora_dropout": 0.0,
            "use_rslora": self.rank_stabilized,
            "target_modules": targets,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "modules_to_save": null,
        });
        let mut tensors = Vec::new();
        for (m, t) in &used {
            let ([a, b], [out, inner]) = (m.names(), m.shape);
            tensors.push(TensorBytes::f32(a, &[t.rank, inner], &t.a));
            tensors.push(TensorBytes::f32(b, &[out, t.rank], &t.b));
        }
        write_folder(folder, |files| {
            files.write(TENSORS, |out| write_tensors(out, &tensors, Some(("format", "pt"))))?;
            if let Some(d) = &self.diffusion {
                files
                    .write(DIFFUSION, |out| Ok(serde_json::to_writer_pretty(out, &diffusion_config::object_of(d))?))?;
            }
            files.write(CONFIG, |out| Ok(serde_json::to_writer_pretty(out, &config)?))
        })
    }
}

/// As an integer where it is one: that is what PEFT declares.
fn number(x: f32) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e9 { json!(x as i64) } else { json!(x) }
}

impl Settings {
    fn parse(text: &str) -> Result<Self> {
        let broken = |e| Error::with_source(ErrorKind::Config, "not an adapter configuration", e);
        let fields: Map<String, Value> = serde_json::from_str(text).map_err(broken)?;
        for (key, value) in &fields {
            check(key, value)?;
        }
        let bad = |key: &str, want: &str| {
            let found = fields.get(key).map_or("missing".into(), Value::to_string);
            Error::new(ErrorKind::Config, format!("{key:?} is {found}; expected {want}"))
        };
        ensure!(fields.contains_key("peft_type"), Config, "\"peft_type\" is missing");
        let rank = fields.get("r").and_then(rank_in).ok_or_else(|| bad("r", "a positive integer"))?;
        let alpha = fields.get("lora_alpha").and_then(alpha_in).ok_or_else(|| bad("lora_alpha", "a number"))?;
        let rank_stabilized = match fields.get("use_rslora") {
            None => false,
            Some(v) => v.as_bool().ok_or_else(|| bad("use_rslora", "true or false"))?,
        };
        let targets = match fields.get("target_modules") {
            Some(Value::String(s)) if s == "all-linear" => Targets::AllLinear,
            Some(Value::String(s)) => Targets::Pattern(pattern("target_modules", s, "")?),
            Some(Value::Array(list)) if !list.is_empty() && list.iter().all(Value::is_string) => {
                Targets::Names(list.iter().filter_map(Value::as_str).map(str::to_owned).collect())
            }
            _ => return Err(bad("target_modules", "a list of names or a pattern")),
        };
        let base_model = fields.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned);
        let ranks = patterns(&fields, "rank_pattern", rank_in)?;
        let alphas = patterns(&fields, "alpha_pattern", alpha_in)?;
        Ok(Self { rank, alpha, rank_stabilized, base_model, targets, ranks, alphas })
    }

    fn load(self, file: &Shards, c: &ModelConfig) -> Result<PeftAdapter> {
        let mut known = HashSet::new();
        let mut tensors = Vec::new();
        for m in modules(c) {
            let [a, b] = m.names();
            let targeted = self.targets.contain(&m.path);
            if file.tensor(&a).is_none() && file.tensor(&b).is_none() && !targeted {
                continue;
            }
            ensure!(targeted, Config, "\"target_modules\" leaves out {}, for which {TENSORS} has matrices", m.path);
            let rank = first(&self.ranks, &m.path).unwrap_or(self.rank);
            let alpha = first(&self.alphas, &m.path).unwrap_or(self.alpha);
            let [out, inner] = m.shape;
            tensors.push(PeftTensor {
                layer: m.layer,
                module: m.role,
                rank,
                alpha,
                a: matrix(file, &a, [rank, inner])?,
                b: matrix(file, &b, [out, rank])?,
            });
            known.extend([a, b]);
        }
        if let Some(TensorEntry { name, .. }) = file.tensors().find(|t| !known.contains(&t.name)) {
            bail!(
                Unsupported,
                "tensor {name:?} is no LoRA matrix of a projection in the {} layers of the model",
                c.layers
            );
        }
        ensure!(!tensors.is_empty(), Config, "\"target_modules\" names no projection of the model");
        let Self { rank, alpha, rank_stabilized, base_model, .. } = self;
        Ok(PeftAdapter { rank, alpha, rank_stabilized, base_model, diffusion: None, tensors })
    }
}

/// Refuses a value that asks for other mathematics than those of plain LoRA.
fn check(key: &str, value: &Value) -> Result<()> {
    let unset = match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
    };
    let fine = match key {
        // Read above.
        "r" | "lora_alpha" | "use_rslora" | "target_modules" | "rank_pattern" | "alpha_pattern" => true,
        // Of no consequence once an adapter is trained.
        "base_model_name_or_path"
        | "revision"
        | "task_type"
        | "inference_mode"
        | "lora_dropout"
        | "auto_mapping"
        | "peft_version"
        | "megatron_core"
        | "qalora_group_size"
        | "runtime_config"
        | "eva_config"
        | "ensure_weight_tying" => true,
        "peft_type" => value == "LORA",
        "bias" => value == "none",
        // Other ways to begin also change the base model's weights.
        "init_lora_weights" => {
            value.is_boolean() || value.as_str().is_some_and(|s| ["gaussian", "eva", "orthogonal"].contains(&s))
        }
        _ => unset,
    };
    ensure!(fine, Unsupported, "{key:?} is {value}; the engine reads plain LoRA without it");
    Ok(())
}

fn rank_in(v: &Value) -> Option<usize> {
    v.as_u64().filter(|r| (1..=1 << 20).contains(r)).map(|r| r as usize)
}

fn alpha_in(v: &Value) -> Option<f32> {
    v.as_f64().map(|a| a as f32).filter(|a| a.is_finite())
}

/// A Python regular expression that matches a whole path of a module; `prefix` may come before.
fn pattern(key: &str, text: &str, prefix: &str) -> Result<Regex> {
    Regex::new(&format!("^(?:{prefix}(?:{text}))$"))
        .map_err(|e| Error::with_source(ErrorKind::Config, format!("{key:?}: {text:?} is not a pattern"), e))
}

fn patterns<T>(fields: &Map<String, Value>, key: &str, read: fn(&Value) -> Option<T>) -> Result<Vec<(Regex, T)>> {
    let list = match fields.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(list)) => list,
        Some(other) => bail!(Config, "{key:?} is {other}; expected an object"),
    };
    let one = |(text, value): (&String, &Value)| {
        let Some(value) = read(value) else { bail!(Config, "{key:?}: {text:?} has the value {value}") };
        Ok((pattern(key, text, r"(?:.*\.)?")?, value))
    };
    list.iter().map(one).collect()
}

/// The value of the first pattern that fits, as in PEFT.
fn first<T: Copy>(patterns: &[(Regex, T)], path: &str) -> Option<T> {
    patterns.iter().find(|(p, _)| p.is_match(path)).map(|(_, value)| *value)
}

fn matrix(file: &Shards, name: &str, shape: [usize; 2]) -> Result<Vec<f32>> {
    let Some((entry, bytes)) = file.tensor(name) else { bail!(Weights, "tensor {name:?} is missing from {TENSORS}") };
    ensure!(entry.shape == shape, Weights, "tensor {name:?}: expected {shape:?}, file has {:?}", entry.shape);
    let StoredType::Known(dtype) = &entry.stored else {
        bail!(Unsupported, "tensor {name:?}: element type {} is not handled", entry.stored);
    };
    let values = HostTensor::new(*dtype, shape[0], shape[1], bytes).context(|| format!("tensor {name:?}"))?.to_f32();
    ensure!(values.iter().all(|x| x.is_finite()), Weights, "tensor {name:?}: not all values are finite");
    Ok(values)
}
