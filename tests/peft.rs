//! LoRA adapters in PEFT's folders: what is written is read, a folder written by hand is read, and whatever is wrong is named.

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use quadriga::Result;
use quadriga::format::peft::{PeftAdapter, PeftTensor};
use quadriga::model::config::{Family, ModelConfig};
use quadriga::model::roles::{LayerRole, Role};
use quadriga::rng::Rng;
use serde_json::{Value, json};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

fn model() -> ModelConfig {
    let mut c = ModelConfig::base(Family::Llama, 32, 8, 12, 2, 12);
    c.kv_heads = 1;
    c.validate().unwrap()
}

fn random(n: usize, rng: &mut Rng) -> Vec<f32> {
    (0..n).map(|_| rng.normal()).collect()
}

fn tensor(layer: usize, module: LayerRole, rank: usize, alpha: f32, rng: &mut Rng) -> PeftTensor {
    let [out, inner] = Role::Layer(layer, module).shape(&model()).unwrap();
    PeftTensor { layer, module, rank, alpha, a: random(rank * inner, rng), b: random(out * rank, rng) }
}

fn settings(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join(CONFIG)).unwrap()).unwrap()
}

#[test]
fn what_is_written_is_read() {
    let (dir, mut rng) = (tempfile::tempdir().unwrap(), Rng::new(3));
    let folder = dir.path().join("adapter");
    let mut uniform = PeftAdapter {
        rank: 4,
        alpha: 8.0,
        rank_stabilized: false,
        base_model: Some("some/model".into()),
        diffusion: None,
        tensors: (0..12)
            .flat_map(|l| [LayerRole::Q, LayerRole::Down].map(|m| (l, m)))
            .map(|(l, m)| tensor(l, m, 4, 8.0, &mut rng))
            .collect(),
    };
    uniform.write(&folder, &model()).unwrap();
    assert_eq!(PeftAdapter::read(&folder, &model()).unwrap(), uniform);
    let s = settings(&folder);
    assert_eq!(
        (&s["target_modules"], &s["rank_pattern"], &s["lora_alpha"]),
        (&json!(["q_proj", "down_proj"]), &json!({}), &json!(8))
    );
    assert_eq!(uniform.scale(&uniform.tensors[0]), 2.0);

    // Written over the first: other ranks, other alphas, not in every layer; 1 and 11 are told apart.
    uniform.tensors = vec![
        tensor(1, LayerRole::Q, 2, 8.0, &mut rng),
        tensor(1, LayerRole::Gate, 4, 0.1, &mut rng),
        tensor(11, LayerRole::Q, 4, 8.0, &mut rng),
    ];
    uniform.rank_stabilized = true;
    uniform.write(&folder, &model()).unwrap();
    assert_eq!(PeftAdapter::read(&folder, &model()).unwrap(), uniform);
    assert_eq!(settings(&folder)["rank_pattern"], json!({"model.layers.1.self_attn.q_proj": 2}));
    assert_eq!(uniform.scale(&uniform.tensors[2]), 4.0);
}

#[test]
fn what_does_not_fit_is_not_written() {
    let (dir, mut rng) = (tempfile::tempdir().unwrap(), Rng::new(3));
    let folder = dir.path().join("adapter");
    let q = tensor(0, LayerRole::Q, 2, 1.0, &mut rng);
    let fails = |tensors: Vec<PeftTensor>| {
        let a = PeftAdapter { rank: 2, alpha: 1.0, rank_stabilized: false, base_model: None, diffusion: None, tensors };
        a.write(&folder, &model()).unwrap_err().to_string()
    };
    assert!(fails(vec![q.clone(), q.clone()]).contains("self_attn.q_proj is given twice"));
    assert!(fails(vec![PeftTensor { rank: 3, ..q.clone() }]).contains("not of rank 3"));
    assert!(fails(vec![PeftTensor { layer: 12, ..q.clone() }]).contains("layer 12"));
    assert!(fails(vec![PeftTensor { module: LayerRole::MlpNorm, ..q }]).contains("mlp.norm"));
    assert!(fails(vec![]).contains("no matrices") && !folder.exists());
}

/// A folder as PEFT leaves it: q everywhere with rank 2, but 3 in layers 10 and 11, in three element types.
struct ByHand {
    folder: tempfile::TempDir,
    config: Value,
    tensors: Vec<(String, &'static str, Vec<usize>, Vec<u8>)>,
}

fn by_hand() -> ByHand {
    let mut tensors = Vec::new();
    for layer in 0..12 {
        let rank = if layer >= 10 { 3 } else { 2 };
        for (m, shape) in [("A", [rank, 8]), ("B", [8, rank])] {
            let values = (0..rank * 8).map(|i| (i as f32 - 5.0) * 0.5 + layer as f32);
            let (dtype, bytes): (_, Vec<u8>) = match layer % 3 {
                0 => ("F32", values.flat_map(f32::to_le_bytes).collect()),
                1 => ("F16", values.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect()),
                _ => ("BF16", values.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect()),
            };
            let name = format!("base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{m}.weight");
            tensors.push((name, dtype, shape.to_vec(), bytes));
        }
    }
    let config = json!({
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5, "q_proj": 7.5},
        "auto_mapping": null,
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "bias": "none",
        "corda_config": null,
        "eva_config": null,
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": "gaussian",
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": 16,
        "lora_bias": false,
        "lora_dropout": 0.05,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": 2,
        "rank_pattern": {r"^model\.layers\.1[01].*": 3},
        "revision": null,
        "target_modules": ["q_proj"],
        "target_parameters": null,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": null,
        "use_dora": false,
        "use_qalora": false,
        "use_rslora": true
    });
    ByHand { folder: tempfile::tempdir().unwrap(), config, tensors }
}

impl ByHand {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The format once more: length, header, data.
    fn read(&self) -> Result<PeftAdapter> {
        fs::write(self.path(CONFIG), self.config.to_string()).unwrap();
        let (mut header, mut data) = (json!({"__metadata__": {"format": "pt"}}), Vec::new());
        for (name, dtype, shape, bytes) in &self.tensors {
            let from = data.len();
            data.extend(bytes);
            header[name] = json!({"dtype": dtype, "shape": shape, "data_offsets": [from, data.len()]});
        }
        let header = header.to_string();
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
        fs::write(self.path(TENSORS), file).unwrap();
        PeftAdapter::read(self.folder.path(), &model())
    }

    fn fails(change: impl FnOnce(&mut Self), what: &str) {
        let mut f = by_hand();
        change(&mut f);
        let e = f.read().unwrap_err().to_string();
        assert!(e.contains(what) && e.contains(f.folder.path().to_str().unwrap()), "{e}\nlacks {what:?}");
    }
}

#[test]
fn a_folder_written_by_hand() {
    let a = by_hand().read().unwrap();
    assert_eq!((a.rank, a.alpha, a.rank_stabilized, a.tensors.len()), (2, 16.0, true, 12));
    assert_eq!(a.base_model.as_deref(), Some("HuggingFaceTB/SmolLM2-135M-Instruct"));
    for (layer, t) in a.tensors.iter().enumerate() {
        let (rank, alpha) = (if layer >= 10 { 3 } else { 2 }, if layer == 0 { 5.0 } else { 7.5 });
        assert_eq!((t.layer, t.module, t.rank, t.alpha), (layer, LayerRole::Q, rank, alpha));
        let want: Vec<f32> = (0..rank * 8).map(|i| (i as f32 - 5.0) * 0.5 + layer as f32).collect();
        assert!(t.a == want && t.b == want, "layer {layer}");
    }
}

#[test]
fn targets_in_every_spelling() {
    let ok = |targets: Value| {
        let mut f = by_hand();
        f.config["target_modules"] = targets;
        f.read().map(|a| a.tensors.len()).map_err(|e| e.to_string())
    };
    assert_eq!(ok(json!(r".*\.self_attn\.q_proj")), Ok(12));
    assert_eq!(ok(json!(["self_attn.q_proj"])), Ok(12));
    // One more than there are, one less, a part of a name, patterns that are none.
    assert!(ok(json!("all-linear")).unwrap_err().contains("layers.0.self_attn.k_proj.lora_A.weight\" is missing"));
    assert!(ok(json!(["v_proj", "q_proj"])).unwrap_err().contains("v_proj.lora_A"));
    assert!(
        ok(json!(["model.layers.0.self_attn.q_proj"]))
            .unwrap_err()
            .contains("leaves out model.layers.1.self_attn.q_proj")
    );
    assert!(ok(json!(["proj"])).unwrap_err().contains("leaves out"));
    assert!(ok(json!("q_proj")).unwrap_err().contains("leaves out"));
    assert!(ok(json!("(")).unwrap_err().contains("\"target_modules\": \"(\" is not a pattern"));
    assert!(ok(json!([])).is_err() && ok(json!(null)).is_err() && ok(json!([1])).is_err());
}

#[test]
fn settings_that_change_the_mathematics_are_named() {
    let changes = [
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("bias", json!("all")),
        ("modules_to_save", json!(["lm_head"])),
        ("layers_to_transform", json!([0, 1])),
        ("layers_to_transform", json!(3)),
        ("layer_replication", json!([[0, 4]])),
        ("trainable_token_indices", json!([5])),
        ("init_lora_weights", json!("pissa")),
        ("peft_type", json!("LOHA")),
        ("a_setting_of_next_year", json!({"x": 1})),
    ];
    for (key, value) in changes {
        ByHand::fails(|f| f.config[key] = value, &format!("{key:?} is "));
    }
    for (key, value) in [("r", json!(0)), ("r", json!(2.5)), ("lora_alpha", json!("16")), ("use_rslora", json!(1))] {
        ByHand::fails(|f| f.config[key] = value, &format!("{key:?} is "));
    }
    for key in ["r", "lora_alpha", "target_modules", "peft_type"] {
        ByHand::fails(|f| drop(f.config.as_object_mut().unwrap().shift_remove(key)), &format!("{key:?} is missing"));
    }
    ByHand::fails(|f| f.config["rank_pattern"] = json!({"q_proj": "x"}), "\"rank_pattern\": \"q_proj\"");
    ByHand::fails(|f| f.config["rank_pattern"] = json!({"(": 3}), "\"rank_pattern\": \"(\"");
    ByHand::fails(|f| f.config["alpha_pattern"] = json!([1]), "\"alpha_pattern\" is [1]");
    ByHand::fails(|f| f.config = json!([]), "not an adapter configuration");
}

#[test]
fn damaged_matrices_are_named() {
    let name = |f: &ByHand, i: usize| f.tensors[i].0.clone();
    let third = "layers.1.self_attn.q_proj.lora_A.weight";
    ByHand::fails(|f| drop(f.tensors.remove(2)), &format!("{third}\" is missing"));
    ByHand::fails(|f| f.tensors[2].2 = vec![8, 2], &format!("{third}\": expected [2, 8], file has [8, 2]"));
    ByHand::fails(
        |f| f.config["rank_pattern"] = json!({}),
        "layers.10.self_attn.q_proj.lora_A.weight\": expected [2, 8]",
    );
    ByHand::fails(|f| f.tensors[2].1 = "I16", &format!("{third}\": element type I16"));
    ByHand::fails(
        |f| f.tensors[2].3[0..2].copy_from_slice(&[0, 0x7E]),
        &format!("{third}\": not all values are finite"),
    );
    ByHand::fails(|f| f.tensors[2].3.truncate(4), TENSORS);
    ByHand::fails(|f| f.tensors[0].0 = name(f, 0).replace("layers.0", "layers.12"), "layers.0.self_attn.q_proj.lora_A");
    let more = |f: &mut ByHand, name: &str| f.tensors.push((name.into(), "F32", vec![1], vec![0; 4]));
    ByHand::fails(|f| more(f, "base_model.model.lm_head.lora_A.weight"), "\"base_model.model.lm_head.lora_A.weight\"");
    ByHand::fails(|f| more(f, "base_model.model.model.layers.12.self_attn.q_proj.lora_A.weight"), "layers.12");

    let f = by_hand();
    f.read().unwrap();
    let bytes = fs::read(f.path(TENSORS)).unwrap();
    let read = || PeftAdapter::read(f.folder.path(), &model());
    let mut rng = Rng::new(8);
    for _ in 0..500 {
        fs::write(f.path(TENSORS), &bytes[..rng.below(bytes.len())]).unwrap();
        assert!(read().unwrap_err().to_string().contains(TENSORS));
        let mut b = bytes.clone();
        b[rng.below(2000)] = rng.next_u32() as u8;
        fs::write(f.path(TENSORS), b).unwrap();
        let _ = read();
    }
    fs::remove_file(f.path(TENSORS)).unwrap();
    assert!(read().unwrap_err().to_string().contains("adapter_model.safetensors: missing"));
    fs::remove_file(f.path(CONFIG)).unwrap();
    assert!(read().unwrap_err().to_string().contains(CONFIG));
}
