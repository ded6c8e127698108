//! Folders of vision transformers: `config.json` and safetensors, as timm and Hugging Face (ViT, DINOv2) write them.
//!
//! Hugging Face's config says the shape; of timm's, which names an architecture, the shape is read off the tensors, and only the number of
//! heads off the config. Positions are given for the size they were trained on; the model interpolates them.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::refuse;
use crate::error::{Context, Result, bail, ensure};
use crate::files::{F32Tensor, TensorBytes, write_folder, write_tensors};
use crate::format::StoredType;
use crate::format::hf_config::{Fields, object};
use crate::format::mmap::read_text;
use crate::format::safetensors::Shards;
use crate::format::vit_names::{Names, Place};
use crate::tensor::HostTensor;
use crate::vision::config::{Pool, VitConfig};
use crate::vision::roles::{BlockRole, VitRole, VitSource};

/// Upper bound of a configuration, far above those that there are.
const MAX_CONFIG: u64 = 16 << 20;

/// What a model is to be beyond its files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VitOptions {
    /// Height and width of the images: positions are interpolated where they were trained on others. `None`: the trained size.
    pub image: Option<[usize; 2]>,
    /// Classes of a new head of zeros in place of the file's. `None`: the file's.
    pub classes: Option<usize>,
}

/// A vision transformer at rest in a folder.
pub struct VitFolder {
    path: PathBuf,
    names: Names,
    config: VitConfig,
    new_head: bool,
    normalization: Option<[Vec<f32>; 2]>,
    tensors: Shards,
}

impl VitFolder {
    /// Opens a folder and compares its tensors with its configuration.
    ///
    /// # Errors
    /// `Config` and `Weights` for what is missing, damaged or of another shape, by file and tensor; `Unsupported` for models with parts
    /// that are not computed here: register tokens, norms on q and k, gated MLPs, other activations than exact GELU.
    pub fn open(folder: &Path, options: VitOptions) -> Result<Self> {
        let path = folder.join("config.json");
        let place = || path.display().to_string();
        let top = object(&read_text(&path, MAX_CONFIG)?).context(place)?;
        let tensors = Shards::open(folder)?;
        let names = Names::of(&top, &tensors).context(place)?;
        let mut config = match names {
            Names::Timm { .. } => timm_config(&top, &tensors).context(place)?,
            _ => hf_config(&top, &names, &tensors).context(place)?,
        };
        if let Some(image) = options.image {
            config.image = image;
        }
        let head = match names.place(VitRole::Head) {
            Place::Whole(name) => tensors.entry(&name).map(|t| t.shape.clone()),
            Place::Third(..) => None,
        };
        config.classes = match (options.classes, head) {
            (Some(n), _) => n,
            (None, Some(shape)) => {
                let one = shape.len() == 2 && shape[1] == config.hidden;
                ensure!(
                    one,
                    Unsupported,
                    "{}: a head {shape:?} on {} columns: it reads more than one pooled row; ask for a new one",
                    folder.display(),
                    config.hidden
                );
                shape[0]
            }
            (None, None) => bail!(Weights, "{}: no head is there; ask for a new one", folder.display()),
        };
        let config = config.validate().context(place)?;
        let normalization = normalization(folder, &top)?;
        let it =
            Self { path: folder.into(), names, config, new_head: options.classes.is_some(), normalization, tensors };
        it.check()?;
        Ok(it)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Means and deviations of the channels that images are normalised by, where the folder says them.
    pub fn normalization(&self) -> Option<&[Vec<f32>; 2]> {
        self.normalization.as_ref()
    }

    /// Everything missing, misshapen, of an unknown type or unexpected, by role and by name in the file.
    fn check(&self) -> Result<()> {
        let (mut wrong, mut known) = (Vec::new(), HashSet::new());
        let heads = [VitRole::Head, VitRole::HeadBias];
        for role in VitRole::all(&self.config) {
            known.insert(self.names.place(role).name().to_owned());
            if self.new_head && heads.contains(&role) {
                continue;
            }
            if let Err(e) = self.stored(role) {
                wrong.push(e.to_string());
            }
        }
        for t in self.tensors.tensors().filter(|t| !known.contains(&t.name) && !self.names.harmless(&t.name)) {
            wrong.push(format!("{} {:?} is not part of a model of this kind", t.name, t.shape));
        }
        refuse(&self.path, wrong)
    }

    /// The values of a role's tensor as the file has them, and its rows.
    fn stored(&self, role: VitRole) -> Result<(HostTensor, usize)> {
        let [rows, cols] = role.shape(&self.config.trained()).unwrap_or([0, 0]);
        let place = self.names.place(role);
        let name = place.name();
        let Some((entry, data)) = self.tensors.tensor(name) else {
            bail!(Weights, "{}: {role}: tensor {name} is missing", self.path.display());
        };
        let (n, parts) = (rows * cols, if matches!(place, Place::Third(..)) { 3 } else { 1 });
        // Files differ in the ones around a shape; the elements are the same.
        let plain: Vec<usize> = entry.shape.iter().copied().filter(|&d| d != 1).collect();
        let c = &self.config;
        let want: Vec<usize> = match role {
            VitRole::Patch => vec![c.hidden, c.channels, c.patch, c.patch],
            _ => vec![parts * rows, cols],
        };
        let want: Vec<usize> = match rows {
            1 => vec![parts * cols],
            _ => want,
        };
        let bare = |rows: usize| role == VitRole::Positions && plain == [rows - 1, cols] && c.class_token;
        let fits = plain == want.iter().copied().filter(|&d| d != 1).collect::<Vec<_>>() || bare(rows);
        ensure!(
            fits,
            Weights,
            "{}: {role}: tensor {name} is {:?}, expected {want:?}",
            self.path.display(),
            entry.shape
        );
        let StoredType::Known(dtype) = &entry.stored else {
            bail!(Unsupported, "{}: {role}: tensor {name} has elements of type {}", self.path.display(), entry.stored);
        };
        let elements = if bare(rows) { n - cols } else { parts * n };
        let t = HostTensor::new(*dtype, 1, elements, data).context(|| format!("{}: {name}", self.path.display()))?;
        Ok((t, rows))
    }
}

impl VitSource for VitFolder {
    fn config(&self) -> &VitConfig {
        &self.config
    }

    fn values(&self, role: VitRole) -> Result<Vec<f32>> {
        if self.new_head && matches!(role, VitRole::Head | VitRole::HeadBias) {
            let [rows, cols] = role.shape(&self.config).unwrap_or([0, 0]);
            return Ok(vec![0.0; rows * cols]);
        }
        let (t, rows) = self.stored(role)?;
        let mut values = t.to_f32();
        t.data.release();
        if role == VitRole::Positions && values.len() < rows * self.config.hidden {
            // Positions of patches only: the class token has none.
            values.splice(0..0, vec![0.0; self.config.hidden]);
        }
        Ok(match self.names.place(role) {
            Place::Whole(_) => values,
            Place::Third(_, k) => {
                let n = values.len() / 3;
                values[k * n..(k + 1) * n].to_vec()
            }
        })
    }
}

fn hf_config(top: &Map<String, Value>, names: &Names, tensors: &Shards) -> Result<VitConfig> {
    let f = Fields::of(top);
    for (key, only) in [("hidden_act", "gelu"), ("position_embedding_type", "absolute")] {
        let found = f.str(key)?.unwrap_or(only);
        ensure!(found == only, Unsupported, "{key} {found:?}; only {only:?} is computed");
    }
    ensure!(!f.bool("use_swiglu_ffn")?.unwrap_or(false), Unsupported, "use_swiglu_ffn: a gated MLP");
    let dino = matches!(names, Names::Dinov2 { .. });
    let hidden = f.need("hidden_size")?;
    let mlp = match f.number("mlp_ratio")?.filter(|_| dino) {
        Some(ratio) => (ratio * hidden as f64) as usize,
        None => f.need("intermediate_size")?,
    };
    let image = sides(top.get("image_size"), "image_size")?;
    let patch = sides(top.get("patch_size"), "patch_size")?;
    ensure!(patch[0] == patch[1], Unsupported, "patches of {}x{}", patch[0], patch[1]);
    let eps = f.number("layer_norm_eps")?.unwrap_or(if dino { 1e-6 } else { 1e-12 });
    Ok(VitConfig {
        image,
        trained_image: image,
        channels: f.size("num_channels")?.unwrap_or(3),
        mlp,
        eps: eps as f32,
        qkv_bias: f.bool("qkv_bias")?.unwrap_or(true),
        layer_scale: dino || tensors.tensors().any(|t| t.name.ends_with("layer_scale1.lambda1")),
        ..VitConfig::new(image[0], patch[0], hidden, f.need("num_hidden_layers")?, f.need("num_attention_heads")?, 1)
    })
}

/// A side, or height and width.
fn sides(value: Option<&Value>, key: &str) -> Result<[usize; 2]> {
    let size = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
    let both = match value {
        Some(Value::Array(a)) if a.len() == 2 => size(&a[0]).zip(size(&a[1])),
        Some(v) => size(v).map(|n| (n, n)),
        None => bail!(Config, "{key} is missing"),
    };
    match both {
        Some((h, w)) => Ok([h, w]),
        None => bail!(Config, "{key}: expected a size or two of them"),
    }
}

fn timm_config(top: &Map<String, Value>, tensors: &Shards) -> Result<VitConfig> {
    let f = Fields::of(top);
    let architecture = f.str("architecture")?.unwrap_or_default();
    let shape = |name: &str| match tensors.entry(name) {
        Some(t) => Ok(&t.shape[..]),
        None => bail!(Weights, "tensor {name} is missing"),
    };
    let &[hidden, channels, patch, wide] = shape("patch_embed.proj.weight")? else {
        bail!(Weights, "tensor patch_embed.proj.weight is {:?}", shape("patch_embed.proj.weight")?);
    };
    ensure!(patch == wide && patch > 0, Unsupported, "patches of {patch}x{wide}");
    let given = f.object("model_args")?.map(|m| m.size("num_heads")).transpose()?.flatten();
    // These look like others and compute something else.
    let other = ["quickgelu", "siglip"].into_iter().find(|part| architecture.contains(part));
    ensure!(
        other.is_none(),
        Unsupported,
        "architecture {architecture:?}: its MLPs may have another activation than GELU"
    );
    // Heads are 64 wide in timm's ViTs but for the largest.
    let widths = [("_huge", 80), ("_giant", 88), ("_gigantic", 104), ("_so400m", 72)];
    let width = widths.into_iter().find(|(size, _)| architecture.contains(size)).map_or(64, |(_, width)| width);
    let heads = match given {
        Some(n) => n,
        None if hidden.is_multiple_of(width) => hidden / width,
        None => bail!(Config, "architecture {architecture:?} does not tell how many heads {hidden} columns have"),
    };
    let blocks = (0..).take_while(|i| tensors.entry(&format!("blocks.{i}.norm1.weight")).is_some()).count();
    let mlp = shape("blocks.0.mlp.fc1.weight")?.first().copied().unwrap_or(0);
    let has = |name: &str| tensors.entry(name).is_some();
    let class_token = has("cls_token");
    let rows = match shape("pos_embed")? {
        [1, rows, _] => *rows,
        other => bail!(Weights, "tensor pos_embed is {other:?}"),
    };
    let side = |patches: usize| (0..=patches).find(|s| s * s >= patches).filter(|s| s * s == patches && patches > 0);
    let side = side(rows.saturating_sub(usize::from(class_token))).or_else(|| side(rows));
    let Some(side) = side else { bail!(Unsupported, "pos_embed has {rows} rows, which are no square of patches") };
    let pool = match f.str("global_pool")?.unwrap_or("token") {
        "token" => Pool::Class,
        "avg" => Pool::Mean,
        other => bail!(Unsupported, "global_pool {other:?}"),
    };
    Ok(VitConfig {
        channels,
        mlp,
        class_token,
        pool,
        qkv_bias: has("blocks.0.attn.qkv.bias"),
        layer_scale: has("blocks.0.ls1.gamma"),
        ..VitConfig::new(side.saturating_mul(patch), patch, hidden, blocks, heads, 1)
    })
}

/// Means and deviations, of Hugging Face's `preprocessor_config.json` or timm's `pretrained_cfg`.
fn normalization(folder: &Path, top: &Map<String, Value>) -> Result<Option<[Vec<f32>; 2]>> {
    let numbers = |v: &Value| -> Option<Vec<f32>> {
        v.as_array()?.iter().map(|x| x.as_f64().map(|x| x as f32)).collect::<Option<Vec<f32>>>()
    };
    let both =
        |of: &Map<String, Value>, keys: [&str; 2]| Some([numbers(of.get(keys[0])?)?, numbers(of.get(keys[1])?)?]);
    let path = folder.join("preprocessor_config.json");
    if path.is_file() {
        let text = object(&read_text(&path, MAX_CONFIG)?).context(|| path.display().to_string())?;
        return Ok(both(&text, ["image_mean", "image_std"]));
    }
    Ok(top.get("pretrained_cfg").and_then(Value::as_object).and_then(|c| both(c, ["mean", "std"])))
}

/// Writes a model in F32 as a folder in Hugging Face's form, of class `ViTForImageClassification`; whole or not at all. That form has no
/// LayerScale: its factors go into the linears before it, which changes nothing that is computed.
///
/// # Errors
/// `Unsupported` for a model that pools the patches, which that class does not; files that cannot be written.
pub fn write_vit(weights: &dyn VitSource, out: &Path) -> Result<()> {
    let c = &weights.config().trained();
    ensure!(
        c.class_token && c.pool == Pool::Class,
        Unsupported,
        "{}: ViTForImageClassification reads the class token, this model the mean of its patches",
        out.display()
    );
    let names = Names::Vit { prefix: "vit." };
    let mut tensors: Vec<F32Tensor> = Vec::new();
    for role in VitRole::all(c) {
        use BlockRole::*;
        let mut values = weights.values(role)?;
        let (shape, scale) = (role.shape(c).unwrap_or([0, 0]), |i, r| weights.values(VitRole::Block(i, r)));
        match role {
            VitRole::Block(_, Scale1 | Scale2) => continue,
            VitRole::Block(i, r @ (O | OBias | Fc2 | Fc2Bias)) if c.layer_scale => {
                let factors = scale(i, if matches!(r, O | OBias) { Scale1 } else { Scale2 })?;
                let each = values.len() / factors.len();
                values.chunks_exact_mut(each).zip(factors).for_each(|(v, f)| v.iter_mut().for_each(|v| *v *= f));
            }
            _ => {}
        }
        let dims = match role {
            VitRole::Patch => vec![c.hidden, c.channels, c.patch, c.patch],
            VitRole::ClassToken => vec![1, 1, c.hidden],
            VitRole::Positions => vec![1, shape[0], shape[1]],
            r if r.is_matrix() => shape.to_vec(),
            _ => vec![shape[1]],
        };
        tensors.push((names.place(role).name().to_owned(), dims, values));
    }
    let image = if c.image[0] == c.image[1] { json!(c.image[0]) } else { json!(c.image) };
    let labels: Map<String, Value> = (0..c.classes).map(|i| (i.to_string(), json!(format!("LABEL_{i}")))).collect();
    let ids: Map<String, Value> = (0..c.classes).map(|i| (format!("LABEL_{i}"), json!(i))).collect();
    let config = json!({
        "architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_act": "gelu", "image_size": image,
        "patch_size": c.patch, "num_channels": c.channels, "hidden_size": c.hidden, "num_hidden_layers": c.blocks,
        "num_attention_heads": c.heads, "intermediate_size": c.mlp, "layer_norm_eps": f64::from(c.eps), "qkv_bias": c.qkv_bias,
        "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "dtype": "float32", "id2label": labels, "label2id": ids,
    });
    write_folder(out, |folder| {
        let all: Vec<_> = tensors.iter().map(|(n, s, v)| TensorBytes::f32(n, s, v)).collect();
        folder.write("model.safetensors", |to| write_tensors(to, &all, Some(("format", "pt"))))?;
        folder.write("config.json", |to| to.write_all(format!("{config:#}\n").as_bytes()))
    })
}
