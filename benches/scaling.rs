//! What a training step costs against tokens, rank and layers: CPU seconds and memory of graphs and
//! state, as a table and as plots.
//!
//! `cargo bench --bench scaling -- [--model GGUF] [--data DIR] [--threads N] [--rounds N]
//! [--plots DIR]`
//!
//! A step is one of plain LoRA on TOFU's pairs, so that the rank is free; a constraint adds
//! products of the size of the adapters. Tokens come as pairs of 70 or so, side by side, or joined
//! into one sample. With `--layers` cut, what lies below is kept from the warm-up step on, as in a
//! run.

mod support;

use nepenthe::data::{Sample, Template, build_samples, load_records};
use nepenthe::model::OpenModel;
use nepenthe::report::svg::{Axis, Series, lines};
use nepenthe::train::adapters::Pairs;
use nepenthe::train::config::{Constraint, Init, TrainConfig};
use nepenthe::train::engine::Engine;
use nepenthe::train::trainer::{StepBatch, Trainer};
use std::path::Path;
use support::{Args, Fallible, cpu_seconds, median};

const TOKENS: [usize; 5] = [128, 256, 512, 1024, 2048];
const RANKS: [usize; 6] = [4, 8, 16, 32, 64, 128];
/// What does not vary.
const USUAL: Setting = Setting {
    tokens: 512,
    joined: false,
    rank: 32,
    layers: None,
};

/// The page that plots are made for gives them their looks; a file needs its own.
const LOOKS: &str = "<style>text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd;stroke-width:.7}\
.axis,.tick{stroke:#888}.a{--k:#0b62c4}.b{--k:#b4540a}.l{fill:none;stroke:var(--k);stroke-width:1.8}\
.l.b{stroke-dasharray:6 3}.m{fill:var(--k)}</style>\
<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>";

#[derive(Debug, Clone, Copy)]
struct Setting {
    tokens: usize,
    /// One long sample instead of many short ones.
    joined: bool,
    rank: usize,
    /// The upper so many; none: all.
    layers: Option<usize>,
}

/// CPU seconds of a step, and MB.
type Cost = (f64, f64);

fn main() -> Fallible<()> {
    let args = Args::parse();
    let Some((model, data)) = args.inputs() else {
        return Ok(());
    };
    let open = OpenModel::open(&model, 0)?;
    let template = open.template().unwrap_or(Template::None);
    let records = load_records(&data.join("full.json"))?;
    let samples = build_samples(&records, &open.model, &template, 512)?.samples;
    let bench = Bench {
        open: &open,
        samples: &samples,
        n_threads: args.threads()?[0],
        rounds: args.number("--rounds")?.unwrap_or(3),
    };
    let plots = args.value("--plots").map(Path::new);
    let of_tokens = |joined| {
        move |tokens| Setting {
            tokens,
            joined,
            ..USUAL
        }
    };
    let side_by_side = bench.over("tokens, side by side", &TOKENS, of_tokens(false))?;
    let joined = bench.over("tokens, one sample", &TOKENS, of_tokens(true))?;
    let ranks = bench.over("rank", &RANKS, |rank| Setting { rank, ..USUAL })?;
    let n = open.n_blocks()?;
    let counts: Vec<usize> = (1..=6).map(|i| (i * n).div_ceil(6)).collect();
    let layers = bench.over("upper layers", &counts, |n| Setting {
        layers: Some(n),
        ..USUAL
    })?;
    let Some(dir) = plots else {
        return Ok(());
    };
    std::fs::create_dir_all(dir)?;
    plot(
        dir,
        "tokens",
        &[("side by side", &side_by_side), ("one sample", &joined)],
    )?;
    plot(dir, "rank", &[("", &ranks)])?;
    plot(dir, "layers", &[("", &layers)])
}

struct Bench<'a> {
    open: &'a OpenModel,
    samples: &'a [Sample],
    n_threads: usize,
    rounds: usize,
}

impl Bench<'_> {
    fn over(
        &self,
        what: &str,
        values: &[usize],
        setting: impl Fn(usize) -> Setting,
    ) -> Fallible<Vec<(usize, Cost)>> {
        println!("{what:>20} {:>10} {:>10}", "CPU s", "MB");
        let mut found = Vec::new();
        for &value in values {
            let (seconds, mb) = self.cost(setting(value))?;
            println!("{value:>20} {seconds:>10.2} {mb:>10.0}");
            found.push((value, (seconds, mb)));
        }
        Ok(found)
    }

    fn cost(&self, setting: Setting) -> Fallible<Cost> {
        let n_blocks = self.open.n_blocks()?;
        let upper = |n: usize| format!("{}-{}", n_blocks - n, n_blocks - 1).parse();
        let config = TrainConfig {
            init: Init::Lora,
            constraint: Constraint::None,
            layers: setting.layers.map(upper).transpose()?,
            micro_tokens: 4096,
            ..TrainConfig::default()
        };
        let batch = self.batch(setting);
        let mut engine = Engine::new(self.open, self.n_threads, config.micro_tokens)?
            .on_layers(config.layers.as_ref())?;
        // Memory is not counted: every batch is kept whole.
        let adaptable = engine.template.adaptable.clone();
        engine.keep_whole();
        let scale = config.alpha / setting.rank as f32;
        let pairs = Pairs::lora(&adaptable, setting.rank, scale, 0, Vec::new());
        let mut trainer = Trainer::new(engine, pairs)?;
        let step = StepBatch {
            retain: batch.iter().collect(),
            ..StepBatch::default()
        };
        trainer.step(&config, &step, 1e-5)?;
        let mut seconds = Vec::new();
        for _ in 0..self.rounds {
            let before = cpu_seconds()?;
            trainer.step(&config, &step, 1e-5)?;
            seconds.push(cpu_seconds()? - before);
        }
        let bytes =
            trainer.bytes() + trainer.engine.bytes() + trainer.engine.kept_below().1 as usize;
        Ok((median(seconds), bytes as f64 / 1e6))
    }

    /// TOFU's pairs from the first on, up to so many tokens.
    fn batch(&self, setting: Setting) -> Vec<Sample> {
        let mut batch: Vec<Sample> = Vec::new();
        let mut left = setting.tokens;
        for sample in self.samples {
            let mut sample = sample.clone();
            let n = sample.tokens.len();
            if n > left {
                break;
            }
            left -= n;
            match batch.last_mut().filter(|_| setting.joined) {
                Some(whole) => {
                    let at = whole.tokens.len();
                    whole.tokens.append(&mut sample.tokens);
                    let moved = sample.answers.into_iter().map(|a| a.start + at..a.end + at);
                    whole.answers.extend(moved);
                }
                None => batch.push(sample),
            }
        }
        batch
    }
}

fn plot(dir: &Path, what: &str, series: &[(&str, &Vec<(usize, Cost)>)]) -> Fallible<()> {
    for (name, label) in [
        ("time", "CPU seconds a step"),
        ("memory", "MB of graphs and state"),
    ] {
        let of = |(seconds, mb): Cost| if name == "time" { seconds } else { mb };
        let series: Vec<Series> = series
            .iter()
            .enumerate()
            .map(|(class, (label, costs))| Series {
                label: (*label).to_owned(),
                points: costs.iter().map(|&(x, c)| (x as f64, of(c))).collect(),
                class,
                marks: true,
                line: true,
                ..Series::default()
            })
            .collect();
        let title = format!("{label} against {what}");
        let x = Axis::linear(what, &[0.0]);
        let drawn = lines(&title, &x, &Axis::linear(label, &[0.0]), &series, &[]);
        let (tag, rest) = drawn.split_once('>').ok_or("no tag")?;
        let alone = format!("{tag} xmlns=\"http://www.w3.org/2000/svg\">{LOOKS}{rest}");
        std::fs::write(dir.join(format!("{what}-{name}.svg")), alone)?;
    }
    Ok(())
}
