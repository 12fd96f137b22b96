//! A family read off the names and shapes of a checkpoint whose `model_type` no file knows.
//!
//! Only what cannot be misread is taken: experts named `gate_up_proj` and `down_proj`, fused, or `gate_proj`, `up_proj`
//! and `down_proj`, one tensor each. The shapes of both fused stacks together say which way round they are, as one has
//! twice the inner size.

use std::collections::{BTreeMap, BTreeSet};

use super::{ConfigFields, DiskLayout, ExpertStorage, Family, Modules, StackLayout};
use crate::names::Stack;

/// Where a layer's experts are: path of the layers, and path of the experts below a layer.
type Place<'n> = (&'n str, &'n str);

/// The family of `tensors`, given by name and shape; `None` if they leave a doubt or have no experts.
pub fn family<'n>(model_type: &str, tensors: impl Iterator<Item = (&'n str, &'n [u64])>) -> Option<Family> {
    let mut places: BTreeSet<Place<'n>> = BTreeSet::new();
    let mut stacks: BTreeMap<(&str, Stack), &[u64]> = BTreeMap::new();
    let mut last_expert: Option<u64> = None;
    let (mut attention, mut mlp) = (BTreeSet::new(), BTreeSet::new());
    for (name, shape) in tensors {
        let Some((layers, layer, below)) = split(name) else { continue };
        if let Some((experts, stack)) = fused(below) {
            places.insert((layers, experts));
            stacks.insert((layer, stack), shape);
        } else if let Some((experts, expert)) = per_expert(below) {
            places.insert((layers, experts));
            last_expert = last_expert.max(Some(expert));
        } else if let (Some(module), 2) = (below.strip_suffix(".weight"), shape.len()) {
            let (parent, linear) = module.rsplit_once('.').unwrap_or(("", module));
            if parent == "self_attn" && linear.ends_with("_proj") {
                attention.insert(module.to_string());
            } else if matches!(linear, "gate_proj" | "up_proj" | "down_proj") {
                mlp.insert(module.to_string());
            }
        }
    }
    let place: Vec<Place<'n>> = places.into_iter().collect();
    let [(layers, experts)] = place[..] else { return None };
    let (storage, transposed, experts_counted) = match (stacks.is_empty(), last_expert) {
        (true, Some(last)) => (ExpertStorage::PerExpert, false, last + 1),
        (false, None) => {
            let (transposed, count) = orientation(&stacks)?;
            (ExpertStorage::Fused, transposed, count)
        }
        _ => return None,
    };
    let template =
        |linear: &str| (storage == ExpertStorage::PerExpert).then(|| format!("{experts}.{{e}}.{linear}.weight"));
    Some(Family {
        name: model_type.to_string(),
        model_types: vec![model_type.to_string()],
        layers: layers.to_string(),
        multimodal_prefix: None,
        text_class: None,
        config: ConfigFields::default(),
        modules: Modules {
            experts: Some(experts.to_string()),
            router: vec![],
            attention: attention.into_iter().collect(),
            mlp: mlp.into_iter().collect(),
        },
        layout: StackLayout { transposed, ..StackLayout::default() },
        disk: DiskLayout {
            experts: Some(storage),
            gate: template("gate_proj"),
            up: template("up_proj"),
            down: template("down_proj"),
            ..DiskLayout::default()
        },
        experts_counted: Some(experts_counted),
    })
}

/// Splits `model.layers.3.mlp.gate.weight` into `model.layers`, `model.layers.3` and `mlp.gate.weight`.
fn split(name: &str) -> Option<(&str, &str, &str)> {
    let layers = name.find("layers.")? + "layers".len();
    let (number, below) = name[layers + 1..].split_once('.')?;
    number.parse::<u32>().ok()?;
    Some((&name[..layers], &name[..layers + 1 + number.len()], below))
}

/// Path of the experts module and the stack, of a fused one.
fn fused(below: &str) -> Option<(&str, Stack)> {
    let (experts, parameter) = below.rsplit_once('.')?;
    let stack = Stack::ALL.into_iter().find(|stack| stack.parameter() == parameter)?;
    is_experts(experts).then_some((experts, stack))
}

/// Path of the experts module and the number of the expert, of one tensor per expert.
fn per_expert(below: &str) -> Option<(&str, u64)> {
    let (module, linear) = below.strip_suffix(".weight")?.rsplit_once('.')?;
    let (experts, expert) = module.rsplit_once('.')?;
    let known = matches!(linear, "gate_proj" | "up_proj" | "down_proj") && is_experts(experts);
    known.then_some((experts, expert.parse().ok()?))
}

fn is_experts(path: &str) -> bool {
    path.rsplit('.').next() == Some("experts")
}

/// Whether the stacks are transposed, and the number of experts; `None` unless every layer says the same.
fn orientation(stacks: &BTreeMap<(&str, Stack), &[u64]>) -> Option<(bool, u64)> {
    let mut found = BTreeSet::new();
    for (layer, _) in stacks.keys() {
        let gate_up = <[u64; 3]>::try_from(*stacks.get(&(*layer, Stack::GateUp))?).ok()?;
        let down = <[u64; 3]>::try_from(*stacks.get(&(*layer, Stack::Down))?).ok()?;
        let plain = gate_up[2] == down[1] && gate_up[1] == 2 * down[2];
        let transposed = gate_up[1] == down[2] && gate_up[2] == 2 * down[1];
        if gate_up[0] != down[0] || plain == transposed {
            return None;
        }
        found.insert((transposed, down[0]));
    }
    (found.len() == 1).then(|| found.into_iter().next())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(tensors: &[(&str, &[u64])]) -> Option<Family> {
        family("new", tensors.iter().copied())
    }

    #[test]
    fn one_tensor_per_expert_is_counted() {
        let names: Vec<String> = (0..3)
            .flat_map(|e| ["gate", "up", "down"].map(|p| format!("model.layers.1.mlp.experts.{e}.{p}_proj.weight")))
            .collect();
        let mut tensors: Vec<(&str, &[u64])> = names.iter().map(|name| (name.as_str(), &[4, 6][..])).collect();
        tensors.push(("model.layers.1.self_attn.q_proj.weight", &[6, 6]));
        tensors.push(("model.layers.0.mlp.up_proj.weight", &[9, 6]));
        tensors.push(("model.layers.1.mlp.gate.weight", &[3, 6]));
        let family = detect(&tensors).unwrap();
        assert_eq!((family.layers.as_str(), family.experts_counted), ("model.layers", Some(3)));
        assert_eq!(family.modules.experts.as_deref(), Some("mlp.experts"));
        assert_eq!(family.modules.attention, ["self_attn.q_proj"]);
        assert_eq!(family.modules.mlp, ["mlp.up_proj"]);
        assert_eq!(family.disk.gate.as_deref(), Some("mlp.experts.{e}.gate_proj.weight"));
    }

    #[test]
    fn both_stacks_together_say_which_way_round_they_are() {
        let (gate_up, down) = ("model.layers.0.moe.experts.gate_up_proj", "model.layers.0.moe.experts.down_proj");
        let transposed = |g: [u64; 3], d: [u64; 3]| Some(detect(&[(gate_up, &g), (down, &d)])?.layout.transposed);
        assert_eq!(transposed([5, 40, 64], [5, 64, 20]), Some(false));
        assert_eq!(transposed([5, 64, 40], [5, 20, 64]), Some(true));
        // A square stack of gate and up, or of down, beside one that is not.
        assert_eq!(transposed([5, 64, 64], [5, 64, 32]), Some(false));
        assert_eq!(transposed([5, 64, 64], [5, 32, 64]), Some(true));
        assert_eq!(transposed([5, 128, 64], [5, 64, 64]), Some(false));
        assert_eq!(transposed([5, 40, 64], [5, 64, 21]), None);
        assert_eq!(transposed([5, 40, 64], [4, 64, 20]), None);
    }

    #[test]
    fn doubt_is_no_family() {
        assert!(detect(&[("model.layers.0.mlp.up_proj.weight", &[9, 6])]).is_none());
        assert!(detect(&[("model.layers.0.mlp.experts.gate_up_proj", &[5, 40, 64])]).is_none());
        assert!(detect(&[("model.layers.0.mlp.experts.0.w1.weight", &[20, 64])]).is_none());
        let two = ["a", "b"].map(|part| format!("{part}.layers.0.mlp.experts.0.up_proj.weight"));
        assert!(detect(&[(&two[0], &[20, 64]), (&two[1], &[20, 64])]).is_none());
    }
}
