//! Files of what was learnt: whole, exact, or refused.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::toy::{class, naive, plain};
use super::*;

const KEY: &str = "quadriga-draft-state";

/// All tensors by name.
pub fn tensors(path: &Path) -> Vec<(String, Vec<u8>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<_> = file.tensors().into_iter().map(|(name, t)| (name, t.data().to_vec())).collect();
    all.sort();
    all
}

/// What the file says of itself.
pub fn header(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    serde_json::from_str(&metadata.metadata().as_ref().unwrap()[KEY][64..]).unwrap()
}

/// Writes the file again with another header, whose checksum is right.
fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let bytes = std::fs::read(path).unwrap();
    let n = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut head: Value = serde_json::from_slice(&bytes[8..n]).unwrap();
    let mut inner = header(path);
    change(&mut inner);
    let json = serde_json::to_string(&inner).unwrap();
    let data = &bytes[n..];
    let memory = head["memory"]["data_offsets"][0].as_u64().map_or(data.len(), |at| at as usize);
    let mut hash = Sha256::new();
    [json.as_bytes(), &data[memory..]].into_iter().for_each(|part| hash.update(Sha256::digest(part)));
    hash.update(&data[..memory]);
    let sum: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    head["__metadata__"][KEY] = (sum + &json).into();
    let head = serde_json::to_vec(&head).unwrap();
    std::fs::write(path, [&(head.len() as u64).to_le_bytes()[..], &head, data].concat()).unwrap();
}

/// One that goes on from a file learns what one that never stopped learns.
#[test]
fn a_learner_goes_on_from_its_file() {
    let (world, dir) = (World::new(cpu()), tempfile::tempdir().unwrap());
    let cases = [
        ("hydra", "adam"),
        ("eagle3", "ensemble"),
        ("eagle", "momentum"),
        ("model", "ensemble"),
        ("hydra", "optimistic"),
    ];
    for (kind, rule) in cases {
        // What is remembered of older rows, and of hints, is not in the file.
        let how = Learning { replay: 0.0, check_hints: false, rows: 40, ..eager(rule) };
        let [one, other] = [0, 1].map(|_| world.class(kind, &how));
        let say = |c: &Class<Cpu>, n| {
            world.say(c, &text(n), true, &mut |_| {});
            // No version is left unproven.
            (0..2).for_each(|_| pulse(&world, c, 2));
        };
        (0..5).for_each(|n| say(&one, n));
        let paths = ["a", "b", "c"].map(|name| dir.path().join(name));
        one.with(|l| l.save(&paths[0], Some(b"remembered")).unwrap());
        let mut memory = Vec::new();
        let mut keep = |bytes: &[u8]| {
            memory = bytes.to_vec();
            Ok(())
        };
        other.with(|l| l.restore(&paths[0], &mut keep).unwrap());
        assert_eq!(memory, b"remembered");
        assert!(one.newest() == other.newest(), "{kind}, {rule}: the version that is published");
        (5..10).for_each(|n| [&one, &other].into_iter().for_each(|c| say(c, n)));
        one.with(|l| l.save(&paths[1], None).unwrap());
        other.with(|l| l.save(&paths[2], None).unwrap());
        assert!(tensors(&paths[0]) != tensors(&paths[1]), "{kind}, {rule}");
        assert!(tensors(&paths[1]) == tensors(&paths[2]), "{kind}, {rule}");
        let parts = |p: &Path| ["meta", "steps", "rates", "updates", "rows", "fresh"].map(|k| header(p)[k].clone());
        assert_eq!(parts(&paths[1]), parts(&paths[2]), "{kind}, {rule}");
        assert!(header(&paths[0])["updates"].as_u64() < header(&paths[1])["updates"].as_u64());
        // Rows wait in it: the case is not an empty one.
        assert!(tensors(&paths[1]).iter().any(|t| t.0.starts_with("fresh")), "{kind}, {rule}");
    }
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let (world, dir) = (naive(), tempfile::tempdir().unwrap());
    let path = dir.path().join("learnt.state");
    let how = Learning { guard: (1, 1e9), ..plain("ensemble") };
    let learn = |how: &Learning, n: usize| {
        let (class, _) = class(&world, how, n);
        for _ in 0..3 {
            class.with(|l| l.update().unwrap());
            pulse(&world, &class, 2);
        }
        class.with(|l| l.save(&path, Some(b"memory")).unwrap());
        class
    };
    let one = learn(&how, 3);
    let sound = std::fs::read(&path).unwrap();
    // It has learnt something else, which stays.
    one.with(|l| l.update().unwrap());
    pulse(&world, &one, 2);
    let (at, version) = (dir.path().join("now"), one.slot.newest().0);
    one.with(|l| l.save(&at, None).unwrap());
    let before = tensors(&at);
    let refused = |words: &[&str]| {
        let mut memory = |_: &[u8]| -> Result<()> { panic!("the memory was given something") };
        let error = one.with(|l| l.restore(&path, &mut memory)).unwrap_err().to_string();
        assert!(error.contains("learnt.state") && words.iter().all(|w| error.contains(w)), "{error}: no {words:?}");
        one.with(|l| l.save(&at, None).unwrap());
        assert!(tensors(&at) == before && one.slot.newest().0 == version, "{words:?}: something changed");
    };
    for bit in 0..sound.len() {
        let mut bytes = sound.clone();
        bytes[bit] ^= 1 << (bit % 7);
        std::fs::write(&path, bytes).unwrap();
        refused(&[]);
    }
    for n in (0..sound.len()).step_by(13) {
        std::fs::write(&path, &sound[..n]).unwrap();
        refused(&[]);
    }
    let edited = |change: &dyn Fn(&mut Value)| {
        std::fs::write(&path, &sound).unwrap();
        edit(&path, change);
    };
    edited(&|h| h["written"] = (h["written"].as_u64().unwrap() - 400 * 86_400).into());
    refused(&["400 days old", "365 are allowed"]);
    edited(&|h| h["version"] = 2.into());
    refused(&["version 2"]);
    edited(&|h| h["rates"] = vec![1.0].into());
    refused(&["for 3 experts"]);
    std::fs::remove_file(&path).unwrap();
    refused(&[]);
    learn(&how, 4);
    refused(&["another draft"]);
    for rule in ["adam", "sgd", "momentum"] {
        learn(&plain(rule), 3);
        refused(&["another rule"]);
    }
    // As it was, it is taken; and so is one whose header was only written again.
    for again in [false, true] {
        std::fs::write(&path, &sound).unwrap();
        if again {
            edit(&path, |_| ());
        }
        let mut memory = 0;
        one.with(|l| {
            l.restore(&path, &mut |m| {
                memory += m.len();
                Ok(())
            })
            .unwrap()
        });
        assert_eq!(memory, 6);
    }
    // Too large: what was there stays.
    let (small, _) = class(&world, &Learning { state_mb: 0, ..how }, 3);
    let error = small.with(|l| l.save(&path, None)).unwrap_err();
    assert!(error.to_string().contains("0 are allowed"), "{error}");
    assert!(tensors(&path).len() == SafeTensors::deserialize(&sound).unwrap().len());
}

/// Room that takes a while to write.
const LARGE: usize = 400_000;

fn large() -> (World<quadriga::backend::naive::Naive>, Class<quadriga::backend::naive::Naive>) {
    let world = naive();
    let (class, _) = class(&world, &Learning { guard: (1, 1e9), ..plain("adam") }, LARGE);
    (world, class)
}

/// In a process of its own: see below.
#[test]
fn saves_until_it_is_killed() {
    let Some(path) = std::env::var_os("QUADRIGA_TEST_STATE") else { return };
    let (world, class) = large();
    loop {
        class.with(|l| l.update().unwrap());
        pulse(&world, &class, 2);
        class.with(|l| l.save(Path::new(&path), None).unwrap());
    }
}

#[test]
fn a_killed_process_leaves_a_whole_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("learnt.state");
    let (_world, class) = large();
    let mut restored = 0;
    for kill in 0..6u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "state::saves_until_it_is_killed"])
            .env("QUADRIGA_TEST_STATE", &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        let seen = std::fs::metadata(&path).and_then(|m| m.modified()).ok();
        // Until it has saved once, and then somewhere within.
        while std::fs::metadata(&path).and_then(|m| m.modified()).ok() == seen {
            assert!(start.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none());
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(7 * kill));
        child.kill().unwrap();
        child.wait().unwrap();
        class.with(|l| l.restore(&path, &mut |_| Ok(())).unwrap());
        let w = class.newest();
        assert!(w.len() == LARGE && w[0] > 0.0 && w.iter().all(|x| *x == w[0]));
        restored += 1;
    }
    assert_eq!(restored, 6);
}
