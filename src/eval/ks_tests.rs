use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Golden {
    /// n1, n2, n1·n2·D, ln p by counting paths in integers.
    counts: Vec<(usize, usize, u64, f64)>,
    /// Two samples, SciPy's D and p.
    samples: Vec<(Vec<f64>, Vec<f64>, f64, f64)>,
    /// n1, n2, n1·n2·D, SciPy's asymptotic p.
    asymptotic: Vec<(usize, usize, u64, f64)>,
}

/// Made by tests/golden/ks.py.
fn golden() -> Golden {
    serde_json::from_str(include_str!("../../tests/golden/ks.json")).expect("the script's JSON")
}

fn close(got: f64, want: f64, relative: f64) -> bool {
    (got - want).abs() <= relative * want.abs()
}

#[test]
fn p_values_equal_integer_path_counts() {
    for (n1, n2, distance, ln_p) in golden().counts {
        let test = p_value(n1, n2, distance);
        assert!(test.exact);
        let error = (test.ln_p - ln_p).abs();
        assert!(
            error <= 1e-12 * ln_p.abs() + 1e-14,
            "{n1} {n2} {distance}: {} {ln_p}",
            test.ln_p
        );
        if ln_p > -600.0 {
            assert!(close(test.p, ln_p.exp(), 1e-11), "{n1} {n2} {distance}");
        }
        assert!(test.ln_p.is_finite());
    }
}

#[test]
fn p_is_right_down_to_1e_300() {
    // Fully separated samples of one size have 2 of C(2n, n) orders; n = 501 gives about 1e-300.
    for n in [40usize, 300, 460, 465, 470, 501] {
        let ln_choose: f64 = (1..=n).map(|i| ((n + i) as f64 / i as f64).ln()).sum();
        let test = p_value(n, n, (n * n) as u64);
        assert!(
            close(test.ln_p, 2f64.ln() - ln_choose, 1e-12),
            "{n}: {}",
            test.ln_p
        );
        assert!(close(test.p, test.ln_p.exp(), 1e-12));
    }
    assert!(close(p_value(40, 40, 1600).p, 1.860_340_4e-23, 1e-6));
}

#[test]
fn samples_with_and_without_ties_agree_with_scipy() {
    for (a, b, statistic, p) in golden().samples {
        let test = ks_2samp(&a, &b).unwrap();
        assert!(close(test.statistic, statistic, 1e-14));
        assert!(close(test.p, p, 1e-10), "{} {p}", test.p);
        assert_eq!(
            ks_2samp(&b, &a).unwrap().p.to_bits() >> 12,
            test.p.to_bits() >> 12
        );
    }
}

#[test]
fn large_samples_take_scipys_asymptotic_formula() {
    for (n1, n2, distance, p) in golden().asymptotic {
        let test = p_value(n1, n2, distance);
        assert!(!test.exact);
        assert!(
            close(test.p, p, 1e-8),
            "{n1} {n2} {distance}: {} {p}",
            test.p
        );
    }
}

#[test]
fn plain_and_log_recurrences_agree() {
    for (n1, n2) in [(1, 3), (6, 10), (33, 21), (64, 64)] {
        for distance in (1..=(n1 * n2) as u64).step_by(7) {
            let plain = plain_recurrence(n1, n2, distance);
            let log = log_recurrence(n1, n2, distance);
            assert!(
                (plain.ln() - log).abs() < 1e-11,
                "{n1} {n2} {distance}: {plain} {log}"
            );
        }
    }
}

#[test]
fn equal_empty_and_unordered_samples() {
    let test = ks_2samp(&[1.0, 2.0, -0.0], &[2.0, 0.0, 1.0]).unwrap();
    assert_eq!((test.p, test.statistic), (1.0, 0.0));
    assert_eq!(ks_2samp(&[], &[1.0]), Err(KsError::Empty { n1: 0, n2: 1 }));
    let error = ks_2samp(&[1.0], &[0.0, f64::NAN]).unwrap_err();
    assert_eq!(
        error,
        KsError::NotANumber {
            sample: 2,
            index: 1
        }
    );
    assert!(
        ks_2samp(&[f64::INFINITY; 2], &[f64::INFINITY; 3])
            .unwrap()
            .p
            == 1.0
    );
}
