"""The words and sentences that the demo corpus is made of, in English and Chinese.

`demo` fills the slots; what stands here is text only, so that it can be read, and
added to, in one place. The two languages say the same, not word for word.
"""

NAMES = {
    "en": "Ann Ben Clara David Emma Frank Grace Henry Lucy Max Nora Tom".split(),
    "zh": "小明 小红 小华 小丽 小军 小芳 阿强 阿梅 大伟 春燕 文文 冬冬".split(),
}
PLACES = {
    "en": "market garden river mill school orchard station harbour".split(),
    "zh": "集市 花园 河边 磨坊 学校 果园 车站 码头".split(),
}
FOODS = {
    "en": "apples pears plums nuts peaches carrots cherries buns".split(),
    "zh": "苹果 梨 李子 核桃 桃子 萝卜 樱桃 包子".split(),
}
SMALL_ANIMALS = {
    "en": "frogs snails beetles toads crickets mice ducklings butterflies".split(),
    "zh": "青蛙 蜗牛 甲虫 蟾蜍 蟋蟀 老鼠 小鸭 蝴蝶".split(),
}
PETS = {
    "en": "cat dog goat hen duck rabbit hedgehog lamb".split(),
    "zh": "猫 狗 山羊 母鸡 鸭子 兔子 刺猬 小羊".split(),
}
DAYS = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "zh": [f"星期{day}" for day in "一二三四五六日"],
}
MONTHS = {
    "en": (
        "January February March April May June July August September October"
        " November December"
    ).split(),
    "zh": [f"{n}月" for n in "一 二 三 四 五 六 七 八 九 十 十一 十二".split()],
}
UNITS: dict[str, list[tuple[str, str, int]]] = {
    "en": [
        ("metres", "centimetres", 100),
        ("kilometres", "metres", 1000),
        ("kilograms", "grams", 1000),
        ("centimetres", "millimetres", 10),
        ("hours", "minutes", 60),
        ("weeks", "days", 7),
    ],
    "zh": [
        ("米", "厘米", 100),
        ("千米", "米", 1000),
        ("千克", "克", 1000),
        ("厘米", "毫米", 10),
        ("小时", "分钟", 60),
        ("星期", "天", 7),
    ],
}
WORDS = [
    tuple(pair.split("/"))
    for pair in (
        "water/水 fire/火 mountain/山 river/河 sun/太阳 moon/月亮 tree/树 flower/花"
        " bird/鸟 fish/鱼 horse/马 cow/牛 cat/猫 dog/狗 door/门 book/书 bread/面包"
        " rice/米饭 tea/茶 milk/牛奶 house/房子 road/路 bridge/桥 boat/船 rain/雨"
        " snow/雪 wind/风 hand/手 eye/眼睛 heart/心 friend/朋友 teacher/老师 red/红色"
        " white/白色 black/黑色 big/大 small/小 new/新 good/好 today/今天"
    ).split()
]
# The heading over questions of one kind, or of several.
TITLES: dict[str, dict[str, str]] = {
    "sum": {"en": "Adding", "zh": "加法"},
    "difference": {"en": "Taking away", "zh": "减法"},
    "product": {"en": "The times table", "zh": "乘法表"},
    "larger": {"en": "Which is larger?", "zh": "比大小"},
    "weekday": {"en": "Days of the week", "zh": "星期"},
    "month": {"en": "Months of the year", "zh": "月份"},
    "unit": {"en": "Units", "zh": "单位换算"},
    "word": {"en": "Words in two languages", "zh": "两种语言的词"},
    "row": {"en": "Standing in a row", "zh": "排队"},
    "mixed": {"en": "Questions and answers", "zh": "问答"},
}
# Per kind and language: questions with their answers.
QUESTIONS: dict[str, dict[str, list[tuple[str, str]]]] = {
    "sum": {
        "en": [
            ("What is {a} plus {b}?", "{a} + {b} = {c}."),
            ("How much do {a} and {b} make?", "{a} + {b} = {c}."),
        ],
        "zh": [
            ("{a} 加 {b} 等于几？", "{a} + {b} = {c}。"),
            ("{a} 和 {b} 合起来是多少？", "{a} + {b} = {c}。"),
        ],
    },
    "difference": {
        "en": [
            ("What is {a} minus {b}?", "{a} - {b} = {c}."),
            ("How much is left of {a} without {b}?", "{a} - {b} = {c}."),
        ],
        "zh": [
            ("{a} 减 {b} 等于几？", "{a} - {b} = {c}。"),
            ("从 {a} 里拿走 {b}，还剩多少？", "{a} - {b} = {c}。"),
        ],
    },
    "product": {
        "en": [("What is {a} times {b}?", "{a} × {b} = {c}.")],
        "zh": [("{a} 乘 {b} 等于几？", "{a} × {b} = {c}。")],
    },
    "larger": {
        "en": [
            ("Which is larger, {a} or {b}?", "{high} is larger than {low}."),
            ("Which is smaller, {a} or {b}?", "{low} is smaller than {high}."),
        ],
        "zh": [
            ("{a} 和 {b} 哪个大？", "{high} 比 {low} 大。"),
            ("{a} 和 {b} 哪个小？", "{low} 比 {high} 小。"),
        ],
    },
    "weekday": {
        "en": [
            ("What day is it {n} days after {day}?", "It is {later}."),
            ("Today is {day}. What day is it in {n} days?", "It is {later}."),
        ],
        "zh": [
            ("{day}再过 {n} 天是星期几？", "是{later}。"),
            ("今天是{day}，{n} 天以后是星期几？", "是{later}。"),
        ],
    },
    "month": {
        "en": [
            ("Which month comes after {month}?", "After {month} comes {after}."),
            ("Which month comes before {month}?", "Before {month} comes {before}."),
        ],
        "zh": [
            ("{month}的下一个月是几月？", "{month}的下一个月是{after}。"),
            ("{month}的上一个月是几月？", "{month}的上一个月是{before}。"),
        ],
    },
    "unit": {
        "en": [
            (
                "How many {small} are {n} {large}?",
                "{n} {large} are {many} {small}.",
            ),
        ],
        "zh": [("{n} {large}是多少{small}？", "{n} {large}是 {many} {small}。")],
    },
    "word": {
        "en": [
            ("What is “{english}” in Chinese?", "“{english}” is “{chinese}”."),
            ("What does “{chinese}” mean?", "“{chinese}” means “{english}”."),
        ],
        "zh": [
            ("“{chinese}”用英语怎么说？", "“{chinese}”是“{english}”。"),
            ("“{english}”是什么意思？", "“{english}”的意思是“{chinese}”。"),
        ],
    },
    "row": {
        "en": [
            (
                "{a} stands in front of {b}, and {b} in front of {c}. Who is first?",
                "{a} is first.",
            ),
            (
                "{a} stands in front of {b}, and {b} in front of {c}. Who is last?",
                "{c} is last.",
            ),
        ],
        "zh": [
            ("{a}站在{b}前面，{b}站在{c}前面。谁在最前面？", "{a}在最前面。"),
            ("{a}站在{b}前面，{b}站在{c}前面。谁在最后面？", "{c}在最后面。"),
        ],
    },
}
# A scene, then (question, answer)s about it.
STORIES: dict[str, list[tuple[str, list[tuple[str, str]]]]] = {
    "en": [
        (
            "{a} came back from the {place} with {n} {foods} in a basket. At the gate"
            " stood {b}, who had been waiting since noon. “Take some,” said {a}, and"
            " {b} took {k}. They sat down on the steps and watched the clouds until"
            " supper.",
            [
                ("How many {foods} were left?", "{n} - {k} = {left}."),
                ("Where had {a} been?", "{a} had been at the {place}."),
            ],
        ),
        (
            "It had rained all night, and the path to the {place} was full of puddles."
            " {a} counted {n} {animals} beside the water, and {b}, who had sharper eyes,"
            " found {k} more under the leaves. They stood quite still, so as not to"
            " frighten them.",
            [
                ("How many {animals} did they see?", "{n} + {k} = {total}."),
                ("Who found some under the leaves?", "{b} found them."),
            ],
        ),
        (
            "On {day} {a} put a bean into a pot of earth and set it by the window: a"
            " little water every morning, a long look every evening. Nothing happened."
            " Then, {days} days later, a green tip stood in the pot, and {a} ran to"
            " fetch {b}.",
            [
                ("On which day did the bean come up?", "It was {later}."),
                ("Whom did {a} fetch?", "{a} fetched {b}."),
            ],
        ),
        (
            "{a}, {b} and {c} raced from the {place} to the old bridge. {a} was there"
            " first, out of breath and laughing. {b} came second. {c} had stopped to"
            " help a {pet} across the road and came last, and nobody minded.",
            [
                ("Who came second?", "{b} came second."),
                ("Who helped the {pet}?", "{c} helped the {pet}."),
            ],
        ),
        (
            "In the evening {a} told {b} about a {pet} that got lost. It had walked to"
            " the {place}, found a heap of {foods}, eaten {k} of them and fallen asleep"
            " in the sun. {b} laughed so loudly that the {pet} under the table woke up.",
            [
                ("Where did the {pet} go?", "It went to the {place}."),
                ("How many {foods} did it eat?", "It ate {k} {foods}."),
            ],
        ),
    ],
    "zh": [
        (
            "{a}从{place}回来，篮子里装着 {n} 个{foods}。{b}在门口等了一个中午。"
            "“拿几个吧。”{a}说，{b}就拿了 {k} 个。两个人坐在台阶上看云，"
            "一直看到吃晚饭的时候。",
            [
                ("还剩几个{foods}？", "{n} - {k} = {left}。"),
                ("{a}从哪里回来？", "{a}从{place}回来。"),
            ],
        ),
        (
            "下了一夜的雨，去{place}的小路上到处是水洼。{a}在水边数到 {n} 只{animals}，"
            "{b}眼睛更尖，又在叶子底下找到 {k} 只。他们站着一动不动，生怕惊走了它们。",
            [
                ("一共看到几只{animals}？", "{n} + {k} = {total}。"),
                ("谁在叶子底下找到了它们？", "是{b}找到的。"),
            ],
        ),
        (
            "{day}那天，{a}把一粒豆子种进花盆，放在窗台上，早上浇一点水，"
            "晚上看一眼。起初什么也没有。过了 {days} 天，盆里冒出一个绿芽，"
            "{a}马上跑去叫{b}来看。",
            [
                ("豆子是星期几发芽的？", "是{later}。"),
                ("{a}去叫谁来看？", "{a}去叫{b}。"),
            ],
        ),
        (
            "{a}、{b}和{c}从{place}跑到老桥。{a}第一个到，一边喘气一边笑。{b}第二个到。"
            "{c}在路上停下来，帮一只{pet}过了马路，最后才到，可是谁也没有在意。",
            [
                ("谁第二个到？", "{b}第二个到。"),
                ("谁帮了那只{pet}？", "{c}帮了那只{pet}。"),
            ],
        ),
        (
            "晚上，{a}给{b}讲一只走丢的{pet}。它走到{place}，看见一堆{foods}，"
            "吃了 {k} 个，就在太阳底下睡着了。{b}笑得太响，把桌子底下的{pet}吵醒了。",
            [
                ("那只{pet}走到了哪里？", "它走到了{place}。"),
                ("它吃了几个{foods}？", "它吃了 {k} 个{foods}。"),
            ],
        ),
    ],
}
TURN = {"en": "Q: {}\nA: {}", "zh": "问：{}\n答：{}"}
