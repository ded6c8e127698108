//! Folders of vision transformers that are damaged, or hold what is not computed.

mod common;

use std::path::PathBuf;

use quadriga::format::vit::{VitFolder, VitOptions};
use quadriga::rng::Rng;
use quadriga::vision::{VitRole, VitSource};
use serde_json::Value;

fn folder(name: &str) -> PathBuf {
    common::root().join("models").join(name)
}

/// What is wrong with a folder is said by file and tensor.
#[test]
fn damaged_folders_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let make = |from: &str, config: &dyn Fn(&mut Value)| {
        let path = dir.path().join("model");
        std::fs::create_dir_all(&path).unwrap();
        std::fs::copy(folder(from).join("model.safetensors"), path.join("model.safetensors")).unwrap();
        let mut c: Value =
            serde_json::from_str(&std::fs::read_to_string(folder(from).join("config.json")).unwrap()).unwrap();
        config(&mut c);
        std::fs::write(path.join("config.json"), c.to_string()).unwrap();
        path
    };
    let refused = |from: &str, config: &dyn Fn(&mut Value), says: &[&str]| {
        let e = VitFolder::open(&make(from, config), VitOptions::default()).err().unwrap().to_string();
        assert!(says.iter().all(|s| e.contains(s)), "{e}");
    };
    refused("tiny-vit-hf", &|c| c["hidden_act"] = "gelu_new".into(), &["config.json", "hidden_act \"gelu_new\""]);
    refused("tiny-vit-hf", &|c| c["model_type"] = "swin".into(), &["config.json", "\"swin\""]);
    refused("tiny-vit-hf", &|c| c["image_size"] = 18.into(), &["18 pixels cannot be cut into patches of 4"]);
    refused(
        "tiny-vit-hf",
        &|c| c["image_size"] = 20.into(),
        &["model", "position_embeddings is [1, 17, 32], expected [26, 32]"],
    );
    refused(
        "tiny-vit-hf",
        &|c| c["num_hidden_layers"] = 3.into(),
        &["vit.encoder.layer.2.layernorm_before.weight is missing"],
    );
    refused("tiny-vit-hf", &|c| c["num_hidden_layers"] = 1.into(), &["vit.encoder.layer.1", "is not part of a model"]);
    refused(
        "tiny-vit-hf",
        &|c| c["intermediate_size"] = 63.into(),
        &["intermediate.dense.weight is [64, 32], expected [63, 32]"],
    );
    refused("tiny-vit-timm", &|c| c["global_pool"] = "map".into(), &["global_pool \"map\""]);
    refused("tiny-vit-timm", &|c| c["architecture"] = "resnet50".into(), &["\"resnet50\""]);
    refused("tiny-vit-timm", &|c| c["model_args"]["num_heads"] = 5.into(), &["5 heads do not divide"]);
    refused("tiny-vit-timm", &|c| c["model_args"]["num_heads"] = Value::Null, &["does not tell how many heads"]);
    refused("tiny-dinov2", &|_| (), &["no head is there; ask for a new one"]);
    refused("tiny-dinov2", &|c| c["use_swiglu_ffn"] = true.into(), &["gated MLP"]);
    let path = make("tiny-vit-hf", &|_| ());
    let whole = std::fs::read(path.join("model.safetensors")).unwrap();
    std::fs::write(path.join("model.safetensors"), &whole[..whole.len() - 9]).unwrap();
    let e = VitFolder::open(&path, VitOptions::default()).err().unwrap().to_string();
    assert!(e.contains("model.safetensors"), "{e}");
    let timm = VitFolder::open(&folder("tiny-vit-timm"), VitOptions::default()).unwrap();
    assert_eq!(timm.normalization(), Some(&[vec![0.5], vec![0.5]]));
}

/// Bytes that mean something else are refused or read, and nothing worse.
#[test]
fn no_damage_to_a_folder_is_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(11);
    for name in ["tiny-vit-timm", "tiny-dinov2"] {
        let [config, model] =
            ["config.json", "model.safetensors"].map(|f| std::fs::read(folder(name).join(f)).unwrap());
        let header = 8 + u64::from_le_bytes(*model.first_chunk().unwrap()) as usize;
        let write = |file: &str, bytes: &[u8]| std::fs::write(dir.path().join(file), bytes).unwrap();
        write("model.safetensors", &model);
        let options = VitOptions { image: Some([24, 20]), classes: Some(3) };
        for i in 0..600 {
            let (file, whole, end) =
                if i % 3 > 0 { ("config.json", &config, config.len()) } else { ("model.safetensors", &model, header) };
            let mut bytes = whole.clone();
            for _ in 0..1 + i % 2 {
                bytes[rng.below(end)] = b"0123456789-.,[]{}\"en\0\xff"[rng.below(22)];
            }
            write("config.json", &config);
            write(file, &bytes);
            if let Ok(source) = VitFolder::open(dir.path(), options) {
                VitRole::all(source.config()).for_each(|role| drop(source.values(role)));
            }
            write("model.safetensors", &model);
        }
    }
}
