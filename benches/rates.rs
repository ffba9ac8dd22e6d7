//! How fast a core multiplies weights of each type: ggml's product, and ours that decodes first.
//!
//! `cargo bench --bench rates -- [--threads N] [--rounds N] [--shape N_IN,N_OUT,TOKENS]`
//!
//! GFLOP/s by wall time, the best of the rounds; the contenders take turns.

mod support;

use nepenthe::ggml::{Backend, Ctx, Graph, Plan, Precision, Way, quantize, sys};
use nepenthe::rng::SplitMix64;
use std::time::Instant;
use support::{Args, Fallible};

const REPEATS: u32 = 4;
/// ggml's type numbers.
const TYPES: [(u32, &str); 9] = [
    (0, "F32"),
    (30, "BF16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (6, "Q5_0"),
    (8, "Q8_0"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
];

fn main() -> Fallible<()> {
    let args = Args::parse();
    let rounds = args.number("--rounds")?.unwrap_or(5);
    let shapes: Vec<[usize; 3]> = match args.value("--shape") {
        Some(shape) => {
            let numbers: Vec<usize> = shape.split(',').map(str::parse).collect::<Result<_, _>>()?;
            vec![
                numbers
                    .try_into()
                    .map_err(|_| "--shape wants three numbers")?,
            ]
        }
        None => vec![
            [640, 2048, 526],
            [2048, 640, 526],
            [1536, 576, 526],
            [4096, 1024, 64],
            [640, 16384, 64],
        ],
    };
    for n in args.threads()? {
        println!(
            "{n} thread(s), GFLOP/s: ggml forward, ours forward; ours back, f32 forward and back"
        );
        for shape in &shapes {
            println!("{} x {} x {} tokens", shape[0], shape[1], shape[2]);
            for (ty, name) in TYPES {
                if shape[0] % 256 == 0 || ty < 12 || ty == 30 {
                    let rates = rates(ty, *shape, n, rounds)?;
                    let rates: Vec<String> = rates.iter().map(|r| format!("{r:6.0}")).collect();
                    println!("  {name:5} {}", rates.join(" "));
                }
            }
        }
    }
    Ok(())
}

/// A product ready to be computed.
struct Contender {
    c: Ctx,
    graph: Graph,
    plan: Plan,
}

fn rates(
    ty: u32,
    [n_in, n_out, n]: [usize; 3],
    threads: usize,
    rounds: usize,
) -> Fallible<Vec<f64>> {
    let mut rng = SplitMix64::stream(1, 2);
    let mut normal = |n: usize| (0..n).map(|_| rng.normal()).collect::<Vec<f32>>();
    let bytes = quantize(ty, &normal(n_in * n_out), n_in, None)?;
    let mut cpu = Backend::new(threads)?;
    let mut contenders = Vec::new();
    for ours in [
        None,
        Some((Way::Forward, Precision::Fast)),
        Some((Way::Back, Precision::Fast)),
        Some((Way::Forward, Precision::Exact)),
        Some((Way::Back, Precision::Exact)),
    ] {
        let mut c = Ctx::new(16)?;
        let w = c.leaf(ty, [n_in as i64, n_out as i64, 1, 1], "w")?;
        let inner = match ours {
            Some((Way::Back, _)) => n_out,
            _ => n_in,
        };
        let x = c.leaf(sys::GGML_TYPE_F32, [inner as i64, n as i64, 1, 1], "x")?;
        let y = match ours {
            None => c.mul_mat(w, x)?,
            Some((way, precision)) => c.decoded_product(w, x, way, precision)?,
        };
        cpu.place(&mut c, &[w, x])?;
        c.write(w, &bytes)?;
        c.write(x, &normal(inner * n))?;
        let graph = c.graph(&[y])?;
        let plan = cpu.plan(&c, graph, &[graph])?;
        contenders.push(Contender { c, graph, plan });
    }
    let mut best = vec![f64::INFINITY; contenders.len()];
    for _ in 0..rounds {
        for (best, one) in best.iter_mut().zip(&contenders) {
            let start = Instant::now();
            for _ in 0..REPEATS {
                cpu.compute(&one.c, &one.plan, one.graph)?;
            }
            *best = best.min(start.elapsed().as_secs_f64() / f64::from(REPEATS));
        }
    }
    let flops = 2.0 * (n_in * n_out * n) as f64;
    Ok(best.iter().map(|s| flops / s / 1e9).collect())
}
