//! Many requests in one batch: each gets what it would get alone, whoever comes, goes or waits beside it.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use quadriga::decode::Sampler;
use quadriga::engine::{
    Device, Draft, DraftKind, Engine, EngineOptions, Finish, Generate, Memory, Request, Serving, ServingOptions,
    Speculation,
};

const CONTEXT: usize = 72;

/// Token ids, text, and why it ended.
type Answer = (Vec<u32>, String, Option<Finish>);

#[derive(Clone)]
struct Job {
    prompt: Vec<u32>,
    how: Generate,
    seed: u64,
}

fn open(device: Device, name: &str) -> Engine {
    let options = EngineOptions::default().device(device).threads(2);
    Engine::open_with(common::root().join("models").join(name), options).unwrap()
}

fn warm(temperature: f32) -> Sampler {
    Sampler { temperature, top_k: 40, ..Sampler::greedy() }
}

fn alone(engine: &Engine, draft: &Draft, job: &Job) -> Answer {
    let mut session = engine.session_for(draft, CONTEXT, job.seed).unwrap();
    session.push_ids(&job.prompt).unwrap();
    let (mut ids, mut text) = (Vec::new(), String::new());
    let mut running = session.generate(job.how.clone()).unwrap();
    for piece in running.by_ref() {
        let piece = piece.unwrap();
        ids.extend(piece.id);
        text += &piece.text;
    }
    (ids, text, running.finish())
}

/// Serves `jobs`, of which number i comes at step `comes(i)`; the answers and how many passes that took.
fn served(serving: &mut Serving, jobs: &[Job], comes: impl Fn(usize) -> usize) -> (Vec<Answer>, usize) {
    let (mut answers, mut numbers, mut step) = (vec![Answer::default(); jobs.len()], BTreeMap::new(), 0);
    while numbers.len() < jobs.len() || serving.pending() != (0, 0) {
        for (i, job) in jobs.iter().enumerate().filter(|(i, _)| comes(*i) == step) {
            numbers.insert(serving.submit(&job.prompt, job.how.clone(), job.seed).unwrap(), i);
        }
        for reply in serving.step().unwrap() {
            let (ids, text, finish) = &mut answers[numbers[&reply.request]];
            assert!(finish.is_none(), "nothing comes behind the end");
            ids.extend(reply.pieces.iter().filter_map(|p| p.id));
            reply.pieces.iter().for_each(|p| *text += &p.text);
            *finish = reply.finish;
            assert_eq!(reply.stats.tokens as usize, ids.len());
        }
        step += 1;
    }
    (answers, step)
}

/// Prompts short and long; plain, and speculating with `drafts`; of every end.
fn jobs(engine: &Engine, drafts: &[&Draft], planned: bool) -> Vec<Job> {
    let vocab = engine.config().vocab as u32;
    let prompt = |n: u32, seed: u32| (0..n).map(|i| (seed * 37 + i * i % 11 + i / 9) % vocab).collect::<Vec<u32>>();
    let job = |n, seed, how: Generate| Job { prompt: prompt(n, seed as u32 + 1), how, seed };
    let plain = Generate::default().max_tokens(12).ignore_eos(true);
    let mut all = vec![
        job(3, 0, plain.clone()),
        job(40, 1, plain.clone().sampler(warm(0.8)).max_tokens(9)),
        job(1, 2, plain.clone().sampler(Sampler { repeat_penalty: 1.4, ..warm(0.9) })),
        job(5, 3, plain.clone().max_tokens(1)),
        job(5, 4, plain.clone().max_tokens(0)),
        job(CONTEXT as u32 - 6, 5, plain.clone().max_tokens(1000)),
        job(CONTEXT as u32, 6, plain.clone()),
    ];
    for (i, draft) in drafts.iter().enumerate() {
        let spec = |sampler, how| plain.clone().speculative(sampler, draft, how);
        let seed = 10 * (i as u64 + 1);
        let fixed = Speculation::default().nodes(5).width(2).depth(3);
        all.push(job(6, seed, spec(Sampler::greedy(), fixed)));
        all.push(job(20, seed + 1, spec(Sampler { repeat_penalty: 1.2, ..warm(0.7) }, fixed).max_tokens(17)));
        all.push(job(CONTEXT as u32 - 9, seed + 2, spec(Sampler::greedy(), fixed).max_tokens(1000)));
        if planned {
            all.push(job(8, seed + 3, spec(warm(1.0), Speculation::default()).max_tokens(20)));
        }
    }
    all
}

/// Jobs that end with an end token, or with a stop string in the middle of the text.
fn ending(engine: &Engine, draft: &Draft) -> Vec<Job> {
    let how = |sampler| Generate::default().speculative(sampler, draft, Speculation::default().nodes(4)).max_tokens(50);
    let eos = (0..200).map(|seed| Job { prompt: vec![5, 9], how: how(Sampler { top_k: 0, ..warm(2.0) }), seed });
    let mut jobs: Vec<Job> = eos.filter(|job| alone(engine, draft, job).2 == Some(Finish::Eos)).take(3).collect();
    assert_eq!(jobs.len(), 3);
    let stopped = |seed| {
        let mut job = Job { prompt: vec![7, 5, 7], how: how(warm(1.0)).ignore_eos(true), seed };
        let text: Vec<char> = alone(engine, draft, &job).1.chars().collect();
        // Bytes that are no character come out replaced, and are not found again.
        let whole = text[text.len() / 2..].windows(3).find(|w| !w.contains(&'\u{FFFD}'))?;
        job.how = job.how.stop([whole.iter().collect::<String>()]);
        assert_eq!(alone(engine, draft, &job).2, Some(Finish::Stop));
        Some(job)
    };
    jobs.extend((0..50).filter_map(stopped).take(3));
    assert_eq!(jobs.len(), 6);
    jobs
}

fn every_request_gets_what_it_would_get_alone(device: Device, name: &str, planned: bool) {
    let engine = open(device, name);
    let lookup = engine.draft(&DraftKind::Lookup).unwrap();
    let own = engine.draft(&DraftKind::Layers(vec![0])).unwrap();
    let mixed = engine.with_lookup(&own).unwrap();
    let mut jobs = jobs(&engine, &[&lookup, &own, &mixed], planned);
    jobs.extend(ending(&engine, &own));
    let want: Vec<Answer> = jobs.iter().map(|job| alone(&engine, &lookup, job)).collect();
    for (sequences, rows, every) in
        [(3, 12, 2), (32, 40, 1), (4, 64, 0), (1, 1, 1)].into_iter().take(if planned { 4 } else { 2 })
    {
        let options = ServingOptions::default().sequences(sequences).rows(rows).context(CONTEXT);
        let (got, steps) = served(&mut engine.serving(options).unwrap(), &jobs, |i| i * every);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(got, want, "{name}, {sequences} sequences, {rows} rows: job {i}");
        }
        let tokens: usize = want.iter().map(|w| w.0.len()).sum();
        assert!(sequences == 1 || 2 * steps < tokens, "{steps} passes for {tokens} tokens");
    }
}

#[test]
fn naive() {
    every_request_gets_what_it_would_get_alone(Device::Naive, "tiny-llama", false);
}

#[test]
fn cpu() {
    for name in ["tiny-llama", "tiny-gemma3"] {
        every_request_gets_what_it_would_get_alone(Device::Cpu, name, true);
    }
}

#[test]
fn heads_read_what_the_batch_keeps() {
    let engine = open(Device::Cpu, "tiny-llama");
    for name in ["eagle3", "hydra"] {
        let head = engine.draft(&DraftKind::at(&common::root().join("models/tiny-drafts").join(name))).unwrap();
        let jobs = jobs(&engine, &[&head], true);
        let want: Vec<Answer> = jobs.iter().map(|job| alone(&engine, &head, job)).collect();
        let options = ServingOptions::default().sequences(4).rows(24).context(CONTEXT);
        let (got, _) = served(&mut engine.serving_for(&head, options).unwrap(), &jobs, |i| 2 * i);
        assert_eq!(got, want, "{name}");
        let how = Generate::default().speculative(Sampler::greedy(), &head, Speculation::default());
        let e = engine.serving(options).unwrap().submit(&[1], how, 0).unwrap_err().to_string();
        assert!(e.contains("serving_for"), "{e}");
    }
}

#[test]
fn requests_are_cancelled_refused_and_remembered() {
    let engine = open(Device::Cpu, "tiny-text");
    let memory = Arc::new(Memory::default());
    let draft = engine.lookup_with(&memory).unwrap();
    let how = Generate::default().speculative(Sampler::greedy(), &draft, Speculation::default().nodes(8));
    let job = |seed| Job { prompt: vec![5, 9, 11 + seed as u32], how: how.clone().max_tokens(30), seed };
    let options = ServingOptions::default().sequences(2).rows(20).context(CONTEXT);
    let mut serving = engine.serving(options).unwrap();
    let all: Vec<Request> = (0..4).map(|i| serving.submit(&job(i).prompt, job(i).how, i).unwrap()).collect();
    serving.step().unwrap();
    assert_eq!(serving.pending(), (2, 2));
    assert!(serving.cancel(all[0]) && serving.cancel(all[3]) && !serving.cancel(all[0]));
    assert_eq!(serving.pending(), (1, 1));
    let mut got = BTreeMap::<Request, Vec<u32>>::new();
    while serving.pending() != (0, 0) {
        for reply in serving.step().unwrap() {
            got.entry(reply.request).or_default().extend(reply.pieces.iter().filter_map(|p| p.id));
        }
    }
    assert!(serving.step().unwrap().is_empty());
    // The first token of request 1 came with the pass before.
    assert_eq!(got[&all[1]], alone(&engine, &draft, &job(1)).0[1..]);
    assert_eq!(got[&all[2]], alone(&engine, &draft, &job(2)).0);
    let held = memory.len();
    assert!(held > 30);
    let (again, steps) = served(&mut serving, &[job(1)], |_| 0);
    assert!(again[0].0.len() == 30 && steps < 12 && memory.len() == held, "{steps} passes for what is known");
    let text = serving.submit_text("the", how.clone().max_tokens(2), 0).unwrap();
    assert!(serving.step().unwrap().iter().all(|r| r.request == text));

    let refused =
        |serving: &mut Serving, prompt: &[u32]| serving.submit(prompt, how.clone(), 0).unwrap_err().to_string();
    assert!(refused(&mut serving, &[]).contains("empty"));
    assert!(refused(&mut serving, &[1; CONTEXT + 1]).contains("the context holds 72"));
    assert!(refused(&mut serving, &[100_000]).contains("token 100000"));
    for options in [options.rows(1), options.sequences(0), options.context(0)] {
        assert!(engine.serving(options).is_err());
    }
}
