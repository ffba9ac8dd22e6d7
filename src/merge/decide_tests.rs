use super::*;

fn choice(action: Action, growth: u64, err_f: f64) -> Choice {
    Choice {
        action,
        growth,
        err_f,
        retain_noise: err_f / 100.0,
    }
}

const Q6: Action = Action::Promote(GgmlType::Q6_K);
const Q8: Action = Action::Promote(GgmlType::Q8_0);
const R4: Action = Action::Residue { rank: 4 };

fn tensor(name: &str, norm: f64, grid: f64, others: &[(Action, u64, f64)]) -> Candidate {
    Candidate {
        name: name.into(),
        relative_norm: norm,
        effect: 1.0,
        grid: Some(choice(Action::Grid, 0, grid)),
        others: others.iter().map(|&(a, g, e)| choice(a, g, e)).collect(),
    }
}

fn actions(candidates: &[Candidate], limits: &Limits) -> Vec<(Option<Action>, Reason)> {
    decide(candidates, limits)
        .iter()
        .map(|d| (d.choice.map(|c| c.action), d.reason))
        .collect()
}

fn three() -> Vec<Candidate> {
    vec![
        tensor("good", 0.01, 0.02, &[(Q6, 400, 0.001), (R4, 100, 0.01)]),
        tensor("small", 0.001, 0.04, &[(Q6, 400, 0.01), (R4, 100, 0.02)]),
        tensor("bad", 0.01, 0.5, &[(Q6, 400, 0.01), (R4, 100, 0.03)]),
    ]
}

#[test]
fn only_tensors_in_need_are_moved_without_a_budget() {
    let with = |policy| {
        actions(
            &three(),
            &Limits {
                policy,
                ..Limits::default()
            },
        )
    };
    let good = (Some(Action::Grid), Reason::GoodEnough);
    assert_eq!(
        with(Policy::Promote),
        [
            good,
            (Some(Q6), Reason::SmallUpdate),
            (Some(Q6), Reason::LargeError)
        ]
    );
    assert_eq!(
        with(Policy::Residue),
        [
            good,
            (Some(R4), Reason::SmallUpdate),
            (Some(R4), Reason::LargeError)
        ]
    );
    // The residue gains more per byte.
    assert_eq!(with(Policy::Auto), with(Policy::Residue));
    let kept = (Some(Action::Grid), Reason::NotAllowed);
    assert_eq!(with(Policy::Grid), [good, kept, kept]);
}

#[test]
fn a_budget_goes_to_those_in_need_first_and_never_over() {
    let limits = Limits {
        policy: Policy::Promote,
        ..Limits::default()
    };
    let all = three();
    let spent = |bytes| {
        let limits = Limits {
            max_growth: Some(bytes),
            ..limits
        };
        let decisions = decide(&all, &limits);
        let grown: u64 = decisions
            .iter()
            .filter_map(|d| d.choice)
            .map(|c| c.growth)
            .sum();
        assert!(grown <= bytes, "{grown} of {bytes}");
        decisions.iter().map(|d| d.reason).collect::<Vec<_>>()
    };
    use Reason::{BestUse, GoodEnough, LargeError, OverBudget, SmallUpdate};
    assert_eq!(spent(399), [GoodEnough, OverBudget, OverBudget]);
    assert_eq!(spent(400), [GoodEnough, OverBudget, LargeError]);
    assert_eq!(spent(800), [GoodEnough, SmallUpdate, LargeError]);
    assert_eq!(spent(1200), [BestUse, SmallUpdate, LargeError]);
}

#[test]
fn bytes_go_where_the_error_falls_most_per_byte() {
    let mut all = vec![
        tensor("wide", 0.01, 0.4, &[(Q6, 1000, 0.0)]),
        tensor("narrow", 0.01, 0.3, &[(Q6, 300, 0.0)]),
    ];
    let limits = Limits {
        max_growth: Some(1000),
        ..Limits::default()
    };
    let narrow = [
        (Some(Action::Grid), Reason::OverBudget),
        (Some(Q6), Reason::LargeError),
    ];
    assert_eq!(actions(&all, &limits), narrow);
    // An effect four times as large turns it round.
    all[0].effect = 4.0;
    assert_eq!(actions(&all, &limits)[0].0, Some(Q6));
}

#[test]
fn a_tensor_climbs_while_it_is_in_need() {
    let t = tensor("t", 0.01, 0.6, &[(Q6, 100, 0.2), (Q8, 300, 0.01)]);
    let found = actions(&[t], &Limits::default());
    assert_eq!(found, [(Some(Q8), Reason::LargeError)]);
}

#[test]
fn what_is_no_better_is_not_taken() {
    let t = tensor("t", 0.001, 0.01, &[(Q6, 100, 0.02)]);
    let found = actions(&[t], &Limits::default());
    assert_eq!(found, [(Some(Action::Grid), Reason::NoBetter)]);
}

#[test]
fn a_type_without_grid_is_promoted_or_its_update_dropped() {
    let mut t = tensor("iq", 0.01, 0.0, &[(Q6, 100, 0.02)]);
    t.grid = None;
    let with = |policy| {
        actions(
            std::slice::from_ref(&t),
            &Limits {
                policy,
                ..Limits::default()
            },
        )[0]
    };
    assert_eq!(with(Policy::Auto), (Some(Q6), Reason::NoGrid));
    assert_eq!(with(Policy::Grid), (None, Reason::NotAllowed));
}

#[test]
fn a_percentage_is_of_the_file() {
    let limits = Limits::default().with_growth(1.0, 250_000_000);
    assert_eq!(limits.max_growth, Some(2_500_000));
}

#[test]
fn every_ladder_climbs_to_floats_by_types_whose_blocks_fit() {
    use GgmlType as T;
    let ladder = |mut ty, n| {
        let mut all = vec![];
        while let Some(next) = larger(ty, n) {
            all.push(next);
            ty = next;
        }
        all
    };
    assert_eq!(
        ladder(T::Q2_K, 512),
        [T::Q3_K, T::Q4_K, T::Q6_K, T::Q8_0, T::F16, T::F32]
    );
    assert_eq!(ladder(T::Q4_0, 640), [T::Q5_1, T::Q8_0, T::F16, T::F32]);
    assert_eq!(ladder(T::Q4_1, 64), [T::Q5_1, T::Q8_0, T::F16, T::F32]);
    assert_eq!(ladder(T::Q5_0, 64), [T::Q8_0, T::F16, T::F32]);
    assert_eq!(larger(T::Q2_0, 64), Some(T::Q4_0));
    assert_eq!(promotions(T::Q4_K, 512), [T::Q5_K, T::Q6_K]);
    assert_eq!(promotions(T::Q5_0, 64), [T::Q8_0]);
    assert_eq!(promotions(T::F32, 64), []);
    for &ty in T::ALL {
        let mut bits = ty.block_bytes() * 256 / ty.block_len();
        for next in ladder(ty, 512) {
            let more = next.block_bytes() * 256 / next.block_len();
            assert!(more > bits, "{ty}: {next}");
            bits = more;
        }
    }
}
